"""Advantages of a policy gradient: from rewards, from the teacher, or from both."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NEGATIVE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Component,
    Schedule,
    Scheduled,
    always,
    as_factor,
    spec_field,
)


@frozen(kw_only=True)
class OverlongPenalty:
    """A penalty on long completions, subtracted from the reward in the advantage only.

    It grows linearly from 0 at rollout.max_new_tokens − stretch to `amount` at rollout.max_new_tokens.
    """

    stretch: int = spec_field("number of tokens over which the penalty grows", range=AT_LEAST_ONE)
    amount: Scheduled = spec_field("penalty of a completion of full length", default=1.0, range=POSITIVE)

    def describe(self) -> str:
        """Returns the penalty in words."""
        return f"{self.amount:g} off a full-length completion, less over its last {self.stretch} tokens"


@frozen(kw_only=True)
class GroupRelative(Component):
    """The rollout's reward relative to its group's, the same for all its tokens.

    Standard deviations are unbiased (n − 1).  In a group of one, or of equal rewards, the advantage is 0.
    """

    kind: ClassVar[str] = "group_relative"
    baseline: Literal["group_mean", "none"] = spec_field("what is subtracted from the reward", default="group_mean")
    scale: Literal["none", "group_std", "batch_std"] = spec_field(
        "the standard deviation to divide by", default="none"
    )
    eps: Scheduled = spec_field("added to the standard deviation", default=1e-4, range=POSITIVE)
    overlong: OverlongPenalty | None = spec_field("penalty on long completions", default=None)

    zero_when_equal: ClassVar[bool] = False
    log_ratio: ClassVar[None] = None

    @property
    def group_relative(self) -> GroupRelative:
        """The part from rewards."""
        return self

    def describe(self) -> str:
        centered = "reward" if self.overlong is None else f"reward ({self.overlong.describe()})"
        centered += " − group mean" if self.baseline == "group_mean" else ""
        if self.scale == "none":
            return centered
        return f"({centered}) / ({self.scale.replace('_', ' ')} + {self.eps:g})"


@frozen(kw_only=True)
class LogRatio(Component):
    """log teacher − log student at the sampled token, detached; the student's is from before the batch's first update."""

    kind: ClassVar[str] = "log_ratio"
    center: Literal["none", "sequence"] = spec_field(
        "whether to subtract the mean over the sequence, after floor and discount", default="none"
    )
    floor: Scheduled | None = spec_field("lower bound", default=None, range=NEGATIVE)
    below_floor: Literal["clamp", "leave_out"] = spec_field(
        "raise lower values to the floor, or leave out their tokens", default="clamp"
    )
    discount: Scheduled = spec_field(
        "factor γ of what follows: the advantage is the sum of γ^k times the log-ratio k counted tokens later",
        default=0.0,
        range=SHARE,
    )

    zero_when_equal: ClassVar[bool] = True
    group_relative: ClassVar[None] = None

    @property
    def log_ratio(self) -> LogRatio:
        """The part from the teacher."""
        return self

    @property
    def masking_floor(self) -> Scheduled | None:
        """The log-ratio below which tokens are left out, if there is one."""
        return self.floor if self.below_floor == "leave_out" else None

    def describe(self) -> str:
        low = ""
        if self.floor is not None:
            where = "where it is " if self.below_floor == "leave_out" else ""
            low = f" ({where}at least {self.floor:g})"
        mean = " − its mean over the sequence" if self.center == "sequence" else ""
        later = "" if always(self.discount, 0) else f" + {self.discount:g} × that of the next counted token …"
        return f"log teacher − log student{low}{later}{mean}"

    @property
    def spans_sequence(self) -> bool:
        """Whether a token's advantage depends on other tokens."""
        return self.center == "sequence" or not always(self.discount, 0)


@frozen(kw_only=True)
class AdvantageAdd(Component):
    """group_weight × reward advantage + log_ratio_weight × teacher log-ratio (0 without a teacher prompt)."""

    kind: ClassVar[str] = "advantage_add"
    group_relative: GroupRelative = spec_field("the reward advantage", default=GroupRelative())
    group_weight: Scheduled = spec_field("weight of the reward advantage", default=1.0, range=NOT_NEGATIVE)
    log_ratio: LogRatio = spec_field("the teacher's log-ratio", default=LogRatio())
    log_ratio_weight: Scheduled = spec_field("weight of the teacher's log-ratio", default=1.0, range=NOT_NEGATIVE)

    @property
    def zero_when_equal(self) -> bool:
        """Whether the advantage is 0 where student and teacher agree."""
        return always(self.group_weight, 0)

    def describe(self) -> str:
        reward, ratio = self.group_relative.describe(), self.log_ratio.describe()
        return f"{as_factor(self.group_weight)}({reward}) + {as_factor(self.log_ratio_weight)}({ratio})"


@frozen(kw_only=True)
class AdvantageScale(Component):
    """The reward advantage A, scaled per token by (1 − share) + share × clip(exp(sign(A) δ), 1 − low, 1 + high).

    δ = log teacher − log student.  Without a teacher prompt δ is 0 and A is unchanged.
    """

    kind: ClassVar[str] = "advantage_scale"
    group_relative: GroupRelative = spec_field("the reward advantage A", default=GroupRelative())
    log_ratio: LogRatio = spec_field("the teacher's log-ratio δ", default=LogRatio())
    share: Scheduled = spec_field("share of the teacher's factor in the scale", default=0.5, range=SHARE)
    low: Scheduled = spec_field("lower clip: the factor is at least 1 − low", default=0.2, range=SHARE)
    high: Scheduled = spec_field("upper clip: the factor is at most 1 + high", default=0.2, range=NOT_NEGATIVE)

    zero_when_equal: ClassVar[bool] = False

    def describe(self) -> str:
        reward, ratio = self.group_relative.describe(), self.log_ratio.describe()
        bounds = describe_bounds(self.low, self.high)
        return f"({reward}) scaled by exp(± ({ratio})) within {bounds}, for a share of {self.share:g}"


def describe_bounds(low: Scheduled, high: Scheduled) -> str:
    """Returns the range from 1 − low to 1 + high in words."""
    if isinstance(low, Schedule) or isinstance(high, Schedule):
        return f"1 − ({low:g}) … 1 + ({high:g})"
    return f"{1 - low:g} … {1 + high:g}"


Advantage = GroupRelative | LogRatio | AdvantageAdd | AdvantageScale
"""Each says what it is made of: `group_relative` is its part from rewards, `log_ratio` that from the teacher, or None."""
