"""Blends of the teacher's distribution with another: products of powers, that is, weighted sums of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import POWER, POWER_OR_ZERO, SHARE, Component, Scheduled, always, spec_field
from sdkit.language.specs.teachers import ExternalWeights, FrozenWeights


class BaseBlend(Component, ABC):
    """What training, the plan and the rules ask of a blend.

    The teacher is blended with its partner: the live student, or the fixed weights of `base`.
    """

    __slots__ = ()
    partner_prompt: ClassVar[Literal["student", "teacher"]] = "student"
    """Whose prompt the partner sees."""
    sums_to_one: ClassVar[bool] = True
    """Whether the powers of teacher and partner sum to one."""

    @property
    def starts_as_student(self) -> bool:
        """Whether the blend of a teacher that equals the student equals it too."""
        return self.sums_to_one

    @property
    @abstractmethod
    def factors(self) -> tuple[float, float]:
        """The factors of the teacher's and of the partner's logits.  If one of them is 0, the other is 1."""

    @property
    @abstractmethod
    def changes_student(self) -> bool:
        """Whether blending gives the live student under its own prompt another distribution."""


@frozen(kw_only=True)
class TrustRegionBlend(BaseBlend):
    """Logits (1 − c)·teacher + c·live student, both under the teacher's prompt, c = student_share."""

    kind: ClassVar[str] = "trust_region"
    description: ClassVar[str] = (
        "T^(1 − c) × S^c, S the live student under the teacher's prompt, c = {0.student_share:g}"
    )
    partner_prompt: ClassVar[Literal["student", "teacher"]] = "teacher"
    base: ClassVar[None] = None
    student_share: Scheduled = spec_field("the live student's share", range=SHARE)

    @property
    def factors(self) -> tuple[float, float]:
        return 1 - self.student_share, self.student_share

    @property
    def changes_student(self) -> bool:
        return False


@frozen(kw_only=True)
class ProductBlend(BaseBlend):
    """Teacher × student^b, b = student_power; the live student under its own prompt, detached."""

    kind: ClassVar[str] = "product"
    description: ClassVar[str] = "T × S^b, S the live student under the student's prompt, b = {0.student_power:g}"
    base: ClassVar[None] = None
    sums_to_one: ClassVar[bool] = False
    student_power: Scheduled = spec_field("power of the live student", range=POWER_OR_ZERO)

    @property
    def factors(self) -> tuple[float, float]:
        return 1.0, self.student_power

    @property
    def changes_student(self) -> bool:
        return not always(self.student_power, 0)


@frozen(kw_only=True)
class GeometricBlend(BaseBlend):
    """Start model^(1 − w) × teacher^w, w = teacher_share; the frozen start model under the student's prompt."""

    kind: ClassVar[str] = "geometric"
    description: ClassVar[str] = (
        "B^(1 − w) × T^w, B the frozen start model under the student's prompt, w = {0.teacher_share:g}"
    )
    base: ClassVar[FrozenWeights] = FrozenWeights()
    teacher_share: Scheduled = spec_field("power of the teacher", range=SHARE)

    @property
    def factors(self) -> tuple[float, float]:
        return self.teacher_share, 1 - self.teacher_share

    @property
    def changes_student(self) -> bool:
        return not always(self.teacher_share, 1)


@frozen(kw_only=True)
class ExtrapolateBlend(BaseBlend):
    """Teacher^f × base^(1 − f), f = factor; the base under the student's prompt.  f > 1 extrapolates beyond the teacher."""

    kind: ClassVar[str] = "extrapolate"
    factor: Scheduled = spec_field("power of the teacher", range=POWER)
    base: FrozenWeights | ExternalWeights = spec_field(
        "the model to extrapolate from: the start model or another one", default=FrozenWeights()
    )

    @property
    def factors(self) -> tuple[float, float]:
        return self.factor, 1 - self.factor

    @property
    def changes_student(self) -> bool:
        return not always(self.factor, 1)

    @property
    def starts_as_student(self) -> bool:
        return not self.base.is_other_model

    def describe(self) -> str:
        return f"T^f × B^(1 − f), B {self.base.describe()} under the student's prompt, f = {self.factor:g}"


Blend = TrustRegionBlend | ProductBlend | GeometricBlend | ExtrapolateBlend
