"""Divergences between student and teacher, and their clipping."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from sdkit.language.specs.fields import INSIDE_SHARE, NAME, PATH, POSITIVE, SHARE, SIGNED, Scheduled, spec_field


@frozen(kw_only=True)
class ForwardKl:
    """KL(teacher‖student): mode-covering."""

    kind: ClassVar[str] = "forward_kl"


@frozen(kw_only=True)
class ReverseKl:
    """KL(student‖teacher): mode-seeking."""

    kind: ClassVar[str] = "reverse_kl"
    detach_weights: bool = spec_field(
        "detach the student's probability as a weight of the log-ratio: its gradient has a term that sums to zero over "
        "the whole vocabulary but not over a part of it",
        default=False,
    )


@frozen(kw_only=True)
class Jsd:
    """Generalised Jensen-Shannon divergence around M = (1−s)·student + s·teacher, s = teacher_share."""

    kind: ClassVar[str] = "jsd"
    teacher_share: Scheduled = spec_field("the teacher's share of the mixture", default=0.5, range=INSIDE_SHARE)


@frozen(kw_only=True)
class LinearMix:
    """forward_share × forward KL + (1 − forward_share) × reverse KL."""

    kind: ClassVar[str] = "linear_mix"
    forward_share: Scheduled = spec_field("weight of the forward KL", default=0.5, range=SHARE)


@frozen(kw_only=True)
class SkewedForwardKl:
    """KL(teacher‖share·teacher + (1 − share)·student)."""

    kind: ClassVar[str] = "skewed_forward_kl"
    share: Scheduled = spec_field("the teacher's share of the mixture", default=0.1, range=INSIDE_SHARE)


@frozen(kw_only=True)
class SkewedReverseKl:
    """KL(student‖share·student + (1 − share)·teacher)."""

    kind: ClassVar[str] = "skewed_reverse_kl"
    share: Scheduled = spec_field("the student's share of the mixture", default=0.1, range=INSIDE_SHARE)


@frozen(kw_only=True)
class FileDivergence:
    """A user-defined function `function(student, teacher) -> token losses`: [..., K] log-probabilities -> [...].

    Entries may be −inf.  It is tested on small inputs before training: it must keep no state, treat positions
    independently and give a gradient to the student only.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", range=PATH)
    function: str = spec_field("name of the function", range=NAME)
    zero_when_equal: bool = spec_field(
        "whether value and gradient are 0 where student and teacher agree", default=True
    )
    exact_gradient: bool = spec_field("whether its gradient is that of its value, with no part detached", default=True)


Divergence = ForwardKl | ReverseKl | Jsd | LinearMix | SkewedForwardKl | SkewedReverseKl | FileDivergence


@frozen(kw_only=True)
class DivergenceClip:
    """Bounds inside a divergence; clipped values carry no gradient."""

    entry: Scheduled | None = spec_field(
        "upper bound of the entry p (log p − log q) of one vocabulary token", default=None, range=POSITIVE
    )
    token: Scheduled | None = spec_field("upper bound of the divergence at one position", default=None, range=POSITIVE)
    log_ratio: tuple[float, float] | None = spec_field(
        "lower and upper bound of log student − log teacher", default=None, each=SIGNED
    )
