"""Divergences between student and teacher, and their clipping."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from sdkit.language.specs.fields import (
    INSIDE_SHARE,
    NAME,
    POSITIVE,
    SHARE,
    SIGNED,
    Component,
    Schedule,
    Scheduled,
    spec_field,
)


class BaseDivergence(Component):
    """What the loss terms and rules ask of a divergence."""

    __slots__ = ()
    has_entries: ClassVar[bool] = False
    """Whether it is a sum of entries p (log p − log q) over the vocabulary, which `DivergenceClip` can bound."""
    zero_when_equal: bool = True
    """Whether value and gradient are 0 where student and teacher agree."""

    @property
    def details(self) -> tuple[str, ...]:
        """Texts that `sdkit plan` shows after the support."""
        return ()


@frozen(kw_only=True)
class ForwardKl(BaseDivergence):
    """KL(teacher‖student): mode-covering."""

    kind: ClassVar[str] = "forward_kl"
    description: ClassVar[str] = "forward KL(teacher‖student)"
    has_entries: ClassVar[bool] = True


@frozen(kw_only=True)
class ReverseKl(BaseDivergence):
    """KL(student‖teacher): mode-seeking."""

    kind: ClassVar[str] = "reverse_kl"
    description: ClassVar[str] = "reverse KL(student‖teacher)"
    has_entries: ClassVar[bool] = True
    detach_weights: bool = spec_field(
        "detach the student's probability as a weight of the log-ratio: its gradient has a term that sums to zero over "
        "the whole vocabulary but not over a part of it",
        default=False,
    )

    @property
    def details(self) -> tuple[str, ...]:
        return ("weights detached",) if self.detach_weights else ()


@frozen(kw_only=True)
class Jsd(BaseDivergence):
    """Generalised Jensen-Shannon divergence around M = (1−s)·student + s·teacher, s = teacher_share."""

    kind: ClassVar[str] = "jsd"
    description: ClassVar[str] = "Jensen-Shannon divergence (teacher_share {0.teacher_share:g})"
    teacher_share: Scheduled = spec_field("the teacher's share of the mixture", default=0.5, range=INSIDE_SHARE)


@frozen(kw_only=True)
class LinearMix(BaseDivergence):
    """forward_share × forward KL + (1 − forward_share) × reverse KL."""

    kind: ClassVar[str] = "linear_mix"
    forward_share: Scheduled = spec_field("weight of the forward KL", default=0.5, range=SHARE)

    def describe(self) -> str:
        if isinstance(self.forward_share, Schedule):
            return f"forward KL and reverse KL (forward_share {self.forward_share:g})"
        return f"{self.forward_share:g} × forward KL + {1 - self.forward_share:g} × reverse KL"


@frozen(kw_only=True)
class SkewedForwardKl(BaseDivergence):
    """KL(teacher‖share·teacher + (1 − share)·student)."""

    kind: ClassVar[str] = "skewed_forward_kl"
    description: ClassVar[str] = "skewed forward KL(teacher‖mixture), {0.share:g} of it the teacher"
    share: Scheduled = spec_field("the teacher's share of the mixture", default=0.1, range=INSIDE_SHARE)


@frozen(kw_only=True)
class SkewedReverseKl(BaseDivergence):
    """KL(student‖share·student + (1 − share)·teacher)."""

    kind: ClassVar[str] = "skewed_reverse_kl"
    description: ClassVar[str] = "skewed reverse KL(student‖mixture), {0.share:g} of it the student"
    share: Scheduled = spec_field("the student's share of the mixture", default=0.1, range=INSIDE_SHARE)


@frozen(kw_only=True)
class FileDivergence(BaseDivergence):
    """A user-defined function `function(student, teacher) -> token losses`: [..., K] log-probabilities -> [...].

    Entries may be −inf.  It is tested on small inputs before training: it must keep no state, treat positions
    independently and give a gradient to the student only.
    """

    kind: ClassVar[str] = "file"
    description: ClassVar[str] = "{0.function} in {0.file}"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
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

    def describe(self) -> list[str]:
        """Returns one text for each bound."""
        parts: list[str] = []
        if self.log_ratio:
            parts.append("log student − log teacher within {:g} … {:g}".format(*self.log_ratio))
        if self.entry is not None:
            parts.append(f"each entry at most {self.entry:g}")
        if self.token is not None:
            parts.append(f"each token at most {self.token:g}")
        return parts
