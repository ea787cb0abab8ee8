"""The terms of the objective: how far apart, over which tokens, how corrected, how averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, assert_never

from attrs import frozen

from sdkit.language.specs.divergences import Divergence, DivergenceClip
from sdkit.language.specs.fields import (
    ABOVE_ONE,
    AT_LEAST_ONE,
    NEGATIVE,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    TOP_P,
    Schedule,
    spec_field,
)
from sdkit.language.specs.token_weights import Weight


@frozen(kw_only=True)
class VocabularySupport:
    """Every token of the vocabulary."""

    kind: ClassVar[str] = "vocabulary"


@frozen(kw_only=True)
class TopKSupport:
    """The k likeliest tokens; `remainder` says what becomes of the rest."""

    kind: ClassVar[str] = "top_k"
    k: int = spec_field("how many tokens", range=AT_LEAST_ONE)
    chosen_by: Literal["student", "teacher", "union"] = spec_field("whose likeliest tokens")
    remainder: Literal["tail_bucket", "renormalize", "renormalize_teacher", "drop"] = spec_field(
        "the probability outside the k tokens"
    )


@frozen(kw_only=True)
class SampledTokenSupport:
    """The sampled token alone: an estimate of the reverse KL's gradient."""

    kind: ClassVar[str] = "sampled_token"


Support = VocabularySupport | TopKSupport | SampledTokenSupport


@frozen(kw_only=True)
class MaskSpec:
    """Which completion tokens count; tokens left out stay in the attention."""

    skip_first: int = spec_field(
        "leave out the first so many tokens", default=0, range=NOT_NEGATIVE_COUNT
    )
    prefix: int | None = spec_field(
        "only the first so many tokens", default=None, range=AT_LEAST_ONE
    )
    special_tokens: Literal["count", "leave_out"] = spec_field(
        "the tokenizer's special tokens, the end token among them", default="count"
    )
    teacher_entropy_above: float | Schedule | None = spec_field(
        "only where the teacher's entropy exceeds so many nats", default=None, range=NOT_NEGATIVE
    )
    student_entropy_top: float | Schedule | None = spec_field(
        "of the tokens left in the rollout batch, only the share with the student's largest entropies",
        default=None,
        range=TOP_P,
    )


@frozen(kw_only=True)
class OldPolicyRatio:
    """Ratio of the student now to the student when the batch was sampled, token by token."""

    cap: float | Schedule = spec_field("upper bound", range=POSITIVE)


@frozen(kw_only=True)
class SamplerRatio:
    """Ratio of the trainer's log-probabilities to the sampling engine's."""

    cap: float | Schedule = spec_field("upper bound", range=POSITIVE)
    level: Literal["token", "sequence_mean"] = spec_field(
        "one ratio per token, or their mean per sequence"
    )


@frozen(kw_only=True)
class ImportanceSpec:
    """Corrections for tokens that other weights, or another engine, sampled."""

    old_policy: OldPolicyRatio | None = spec_field("to the weights before this batch", default=None)
    sampler: SamplerRatio | None = spec_field("to the sampling engine", default=None)


@frozen(kw_only=True)
class PerToken:
    """Mean over all loss tokens of the global batch."""

    kind: ClassVar[str] = "per_token"
    denominator: Literal["own", "joint", "completions"] = spec_field(
        "number of this term's tokens, of all terms' that say joint, or of the completions', counted or not",
        default="own",
    )


@frozen(kw_only=True)
class PerSequence:
    """Mean over each sequence's loss tokens, then over sequences."""

    kind: ClassVar[str] = "per_sequence"
    empty_rows: Literal["count", "skip"] = spec_field(
        "whether a sequence without loss tokens counts as a zero", default="skip"
    )


@frozen(kw_only=True)
class SequenceSum:
    """Sum over each sequence, then mean over sequences."""

    kind: ClassVar[str] = "sequence_sum"


@frozen(kw_only=True)
class Constant:
    """Sum over everything, divided by sequences × a constant length."""

    kind: ClassVar[str] = "constant"
    length: float | Schedule = spec_field("the constant, tokens", range=POSITIVE)


@frozen(kw_only=True)
class Sum:
    """Plain sum; the learning rate then depends on batch size and length."""

    kind: ClassVar[str] = "sum"


Average = PerToken | PerSequence | SequenceSum | Constant | Sum


@frozen(kw_only=True)
class Distillation:
    """Pull the student's distribution towards the teacher's."""

    kind: ClassVar[str] = "distillation"
    divergence: Divergence = spec_field("how far apart")
    support: Support = spec_field("over which tokens of the vocabulary")
    clip: DivergenceClip = spec_field("bounds", default=DivergenceClip())
    temperature: float | Schedule | None = spec_field(
        "divides both sides' logits (default: the sampling temperature)",
        default=None,
        range=TEMPERATURE,
    )
    mask: MaskSpec = spec_field("which positions", default=MaskSpec())
    importance: ImportanceSpec = spec_field("how corrected", default=ImportanceSpec())
    weight: Weight | None = spec_field(
        "what each token weighs (default: all the same)", default=None
    )
    average: Average = spec_field("how averaged", default=PerToken())
    coefficient: float | Schedule = spec_field(
        "weight of this term", default=1.0, range=NOT_NEGATIVE
    )


@frozen(kw_only=True)
class CrossEntropy:
    """Raise the log-probability of the completion's tokens."""

    kind: ClassVar[str] = "cross_entropy"
    mask: MaskSpec = spec_field("which positions", default=MaskSpec())
    weight: Weight | None = spec_field(
        "what each token weighs (default: all the same)", default=None
    )
    average: Average = spec_field("how averaged", default=PerToken())
    coefficient: float | Schedule = spec_field(
        "weight of this term", default=1.0, range=NOT_NEGATIVE
    )


@frozen(kw_only=True)
class OverlongPenalty:
    """Taken off the reward, for the advantage alone: amount × how far the completion reaches into its last tokens.

    Nothing up to rollout.max_new_tokens − stretch, the whole amount at rollout.max_new_tokens.
    """

    stretch: int = spec_field("how many tokens are the last ones", range=AT_LEAST_ONE)
    amount: float | Schedule = spec_field(
        "what a completion of full length loses", default=1.0, range=POSITIVE
    )


@frozen(kw_only=True)
class GroupRelative:
    """The rollout's reward against its group's, the same for all its tokens.

    Standard deviations are the unbiased ones (over n − 1).  Where nothing varies, in a group of one or of equal rewards,
    the advantage is 0.
    """

    kind: ClassVar[str] = "group_relative"
    baseline: Literal["group_mean", "none"] = spec_field(
        "what is taken off the reward", default="group_mean"
    )
    scale: Literal["none", "group_std", "batch_std"] = spec_field(
        "the standard deviation that the rest is divided by", default="none"
    )
    eps: float | Schedule = spec_field(
        "added to the standard deviation", default=1e-4, range=POSITIVE
    )
    overlong: OverlongPenalty | None = spec_field("what long completions lose", default=None)


@frozen(kw_only=True)
class LogRatio:
    """log teacher − log student (before this batch's first update) at the sampled token, a constant of the gradient."""

    kind: ClassVar[str] = "log_ratio"
    center: Literal["none", "sequence"] = spec_field(
        "take off the mean over the sequence, after the floor", default="none"
    )
    floor: float | Schedule | None = spec_field("lower bound", default=None, range=NEGATIVE)
    below_floor: Literal["clamp", "leave_out"] = spec_field(
        "raise lower values to the floor, or do not count their tokens", default="clamp"
    )


@frozen(kw_only=True)
class AdvantageAdd:
    """group_weight × the reward's advantage + log_ratio_weight × the teacher's; without a teacher prompt its part is 0."""

    kind: ClassVar[str] = "advantage_add"
    group_relative: GroupRelative = spec_field("the reward's part", default=GroupRelative())
    group_weight: float | Schedule = spec_field(
        "weight of the reward's part", default=1.0, range=NOT_NEGATIVE
    )
    log_ratio: LogRatio = spec_field("the teacher's part", default=LogRatio())
    log_ratio_weight: float | Schedule = spec_field(
        "weight of the teacher's part", default=1.0, range=NOT_NEGATIVE
    )


@frozen(kw_only=True)
class AdvantageScale:
    """The reward's advantage A, each token's × (1 − share) + share × clip(exp(sign(A) δ), 1 − low, 1 + high).

    δ = log teacher − log student; without a teacher prompt it is 0 and A stays as it is.
    """

    kind: ClassVar[str] = "advantage_scale"
    group_relative: GroupRelative = spec_field("the reward's advantage", default=GroupRelative())
    log_ratio: LogRatio = spec_field("the teacher's δ", default=LogRatio())
    share: float | Schedule = spec_field("how far the teacher scales", default=0.5, range=SHARE)
    low: float | Schedule = spec_field("how far below 1 it may scale", default=0.2, range=SHARE)
    high: float | Schedule = spec_field(
        "how far above 1 it may scale", default=0.2, range=NOT_NEGATIVE
    )


Advantage = GroupRelative | LogRatio | AdvantageAdd | AdvantageScale


def reward_part(advantage: Advantage) -> GroupRelative | None:
    """What an advantage takes from the reward."""
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
    """What an advantage takes from the teacher."""
    match advantage:
        case GroupRelative():
            return None
        case LogRatio():
            return advantage
        case AdvantageAdd() | AdvantageScale():
            return advantage.log_ratio
        case _:
            assert_never(advantage)


@frozen(kw_only=True)
class ClipSpec:
    """Loss −min(ρA, clip(ρ, 1 − low, 1 + high) A): no gradient where the ratio ρ has gone far enough A's way."""

    low: float | Schedule = spec_field("how far below 1 the ratio counts", range=SHARE)
    high: float | Schedule = spec_field("how far above 1 the ratio counts", range=NOT_NEGATIVE)
    dual: float | Schedule | None = spec_field(
        "where the advantage is negative, the loss is at most so many times its size",
        default=None,
        range=ABOVE_ONE,
    )


@frozen(kw_only=True)
class PolicyImportance:
    """Correction for tokens that another engine sampled; the ratio to the old policy is ρ itself."""

    sampler: SamplerRatio | None = spec_field("to the sampling engine", default=None)


@frozen(kw_only=True)
class PolicyGradient:
    """Make tokens likelier by their advantage A: loss −ρA, ρ the ratio of the student now to before this batch."""

    kind: ClassVar[str] = "policy_gradient"
    advantage: Advantage = spec_field("what a token is worth")
    ratio: Literal["token", "sequence"] = spec_field(
        "of each token, or their geometric mean over the sequence", default="token"
    )
    clip: ClipSpec | None = spec_field("bounds of the ratio", default=None)
    mask: MaskSpec = spec_field("which positions", default=MaskSpec())
    importance: PolicyImportance = spec_field("how corrected", default=PolicyImportance())
    weight: Weight | None = spec_field(
        "what each token weighs (default: all the same)", default=None
    )
    average: Average = spec_field("how averaged", default=PerToken())
    coefficient: float | Schedule = spec_field(
        "weight of this term", default=1.0, range=NOT_NEGATIVE
    )


@frozen(kw_only=True)
class ReferenceKl:
    """Hold the student near the frozen start model, both under the student's own prompt: KL(student‖reference).

    `k2` is ½ (log student − log reference)² of the sampled token: on the student's own samples its expected gradient is
    that of the KL.  `vocabulary` is the KL itself.  Other estimates have the right value and the wrong gradient.
    """

    kind: ClassVar[str] = "reference_kl"
    estimator: Literal["k2", "vocabulary"] = spec_field("from one token, or from all")
    mask: MaskSpec = spec_field("which positions", default=MaskSpec())
    average: Average = spec_field("how averaged", default=PerToken())
    coefficient: float | Schedule = spec_field(
        "weight of this term", default=1.0, range=NOT_NEGATIVE
    )


LossTerm = Distillation | CrossEntropy | PolicyGradient | ReferenceKl


def needs_teacher(term: LossTerm) -> bool:
    """Whether a term asks the teacher."""
    if isinstance(term, PolicyGradient):
        return teacher_part(term.advantage) is not None
    return isinstance(term, Distillation)


def nothing_without_teacher(term: LossTerm) -> bool:
    """Whether a term counts no token of a rollout without a teacher prompt."""
    if isinstance(term, PolicyGradient):
        return isinstance(term.advantage, LogRatio)
    return isinstance(term, Distillation)


def widest_top_k(losses: Mapping[str, LossTerm]) -> int:
    """The largest k of the terms' supports; 0 where none is a top_k."""
    supports = [t.support for t in losses.values() if isinstance(t, Distillation)]
    return max((s.k for s in supports if isinstance(s, TopKSupport)), default=0)
