"""Blends of the teacher's distribution with another: products of powers, that is, weighted sums of logits."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from sdkit.language.specs.fields import POWER, POWER_OR_ZERO, SHARE, Scheduled, spec_field
from sdkit.language.specs.teachers import ExternalWeights, FrozenWeights


@frozen(kw_only=True)
class TrustRegionBlend:
    """Logits (1 − c)·teacher + c·live student, both under the teacher's prompt, c = student_share."""

    kind: ClassVar[str] = "trust_region"
    student_share: Scheduled = spec_field("the live student's share", range=SHARE)


@frozen(kw_only=True)
class ProductBlend:
    """Teacher × student^b, b = student_power; the live student under its own prompt, detached."""

    kind: ClassVar[str] = "product"
    student_power: Scheduled = spec_field("power of the live student", range=POWER_OR_ZERO)


@frozen(kw_only=True)
class GeometricBlend:
    """Start model^(1 − w) × teacher^w, w = teacher_share; the frozen start model under the student's prompt."""

    kind: ClassVar[str] = "geometric"
    teacher_share: Scheduled = spec_field("power of the teacher", range=SHARE)


@frozen(kw_only=True)
class ExtrapolateBlend:
    """Teacher^f × base^(1 − f), f = factor; the base under the student's prompt.  f > 1 extrapolates beyond the teacher."""

    kind: ClassVar[str] = "extrapolate"
    factor: Scheduled = spec_field("power of the teacher", range=POWER)
    base: FrozenWeights | ExternalWeights = spec_field(
        "the model to extrapolate from: the start model or another one", default=FrozenWeights()
    )


Blend = TrustRegionBlend | ProductBlend | GeometricBlend | ExtrapolateBlend
