"""Advantages of a policy gradient: from rewards, from the teacher, or from both."""

from __future__ import annotations

from typing import ClassVar, Literal, assert_never

from attrs import frozen

from sdkit.language.specs.fields import AT_LEAST_ONE, NEGATIVE, NOT_NEGATIVE, POSITIVE, SHARE, Scheduled, spec_field


@frozen(kw_only=True)
class OverlongPenalty:
    """A penalty on long completions, subtracted from the reward in the advantage only.

    It grows linearly from 0 at rollout.max_new_tokens − stretch to `amount` at rollout.max_new_tokens.
    """

    stretch: int = spec_field("number of tokens over which the penalty grows", range=AT_LEAST_ONE)
    amount: Scheduled = spec_field("penalty of a completion of full length", default=1.0, range=POSITIVE)


@frozen(kw_only=True)
class GroupRelative:
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


@frozen(kw_only=True)
class LogRatio:
    """log teacher − log student at the sampled token, detached; the student's is from before the batch's first update."""

    kind: ClassVar[str] = "log_ratio"
    center: Literal["none", "sequence"] = spec_field(
        "whether to subtract the mean over the sequence, after the floor", default="none"
    )
    floor: Scheduled | None = spec_field("lower bound", default=None, range=NEGATIVE)
    below_floor: Literal["clamp", "leave_out"] = spec_field(
        "raise lower values to the floor, or leave out their tokens", default="clamp"
    )


@frozen(kw_only=True)
class AdvantageAdd:
    """group_weight × reward advantage + log_ratio_weight × teacher log-ratio (0 without a teacher prompt)."""

    kind: ClassVar[str] = "advantage_add"
    group_relative: GroupRelative = spec_field("the reward advantage", default=GroupRelative())
    group_weight: Scheduled = spec_field("weight of the reward advantage", default=1.0, range=NOT_NEGATIVE)
    log_ratio: LogRatio = spec_field("the teacher's log-ratio", default=LogRatio())
    log_ratio_weight: Scheduled = spec_field("weight of the teacher's log-ratio", default=1.0, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class AdvantageScale:
    """The reward advantage A, scaled per token by (1 − share) + share × clip(exp(sign(A) δ), 1 − low, 1 + high).

    δ = log teacher − log student.  Without a teacher prompt δ is 0 and A is unchanged.
    """

    kind: ClassVar[str] = "advantage_scale"
    group_relative: GroupRelative = spec_field("the reward advantage A", default=GroupRelative())
    log_ratio: LogRatio = spec_field("the teacher's log-ratio δ", default=LogRatio())
    share: Scheduled = spec_field("share of the teacher's factor in the scale", default=0.5, range=SHARE)
    low: Scheduled = spec_field("lower clip: the factor is at least 1 − low", default=0.2, range=SHARE)
    high: Scheduled = spec_field("upper clip: the factor is at most 1 + high", default=0.2, range=NOT_NEGATIVE)


Advantage = GroupRelative | LogRatio | AdvantageAdd | AdvantageScale


def reward_part(advantage: Advantage) -> GroupRelative | None:
    """The reward advantage within an advantage; None if it uses no reward."""
    match advantage:
        case GroupRelative():
            return advantage
        case LogRatio():
            return None
        case AdvantageAdd() | AdvantageScale():
            return advantage.group_relative
        case _:
            assert_never(advantage)


def teacher_part(advantage: Advantage) -> LogRatio | None:
    """The teacher's log-ratio within an advantage; None if it uses no teacher."""
    match advantage:
        case GroupRelative():
            return None
        case LogRatio():
            return advantage
        case AdvantageAdd() | AdvantageScale():
            return advantage.log_ratio
        case _:
            assert_never(advantage)
