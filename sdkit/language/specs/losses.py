"""Loss terms: divergence or advantage, support, mask, importance correction and averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.advantages import Advantage, LogRatio, teacher_part
from sdkit.language.specs.divergences import Divergence, DivergenceClip
from sdkit.language.specs.fields import (
    ABOVE_ONE,
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    TOP_P,
    Scheduled,
    spec_field,
)
from sdkit.language.specs.token_weights import Weight


@frozen(kw_only=True)
class VocabularySupport:
    """The whole vocabulary."""

    kind: ClassVar[str] = "vocabulary"


@frozen(kw_only=True)
class TopKSupport:
    """The k likeliest tokens; `remainder` says what happens to the rest of the probability."""

    kind: ClassVar[str] = "top_k"
    k: int = spec_field("number of tokens", range=AT_LEAST_ONE)
    chosen_by: Literal["student", "teacher", "union"] = spec_field("whose likeliest tokens to take")
    remainder: Literal["tail_bucket", "renormalize", "renormalize_teacher", "drop"] = spec_field(
        "what to do with the probability outside the k tokens"
    )


@frozen(kw_only=True)
class SampledTokenSupport:
    """The sampled token alone, which estimates the gradient of the reverse KL."""

    kind: ClassVar[str] = "sampled_token"


Support = VocabularySupport | TopKSupport | SampledTokenSupport


@frozen(kw_only=True)
class MaskSpec:
    """Which completion tokens a term counts.  Masked tokens stay visible to attention."""

    skip_first: int = spec_field("number of tokens to leave out at the start", default=0, range=NOT_NEGATIVE_COUNT)
    prefix: int | None = spec_field("count only this many tokens at the start", default=None, range=AT_LEAST_ONE)
    special_tokens: Literal["count", "leave_out"] = spec_field(
        "whether the tokenizer's special tokens count, including the end token", default="count"
    )
    teacher_entropy_above: Scheduled | None = spec_field(
        "count only tokens where the teacher's entropy exceeds this, nats", default=None, range=NOT_NEGATIVE
    )
    student_entropy_top: Scheduled | None = spec_field(
        "count only this share of the rollout batch's remaining tokens: those with the student's largest entropies",
        default=None,
        range=TOP_P,
    )


@frozen(kw_only=True)
class OldPolicyRatio:
    """Per-token ratio of the current student to the student that sampled the batch."""

    cap: Scheduled = spec_field("upper bound", range=POSITIVE)


@frozen(kw_only=True)
class SamplerRatio:
    """Ratio of the trainer's probabilities to the sampling engine's."""

    cap: Scheduled = spec_field("upper bound", range=POSITIVE)
    level: Literal["token", "sequence_mean"] = spec_field("one ratio per token, or its mean over the sequence")


@frozen(kw_only=True)
class ImportanceSpec:
    """Importance corrections for tokens sampled by other weights or another engine."""

    old_policy: OldPolicyRatio | None = spec_field("ratio to the weights before this batch", default=None)
    sampler: SamplerRatio | None = spec_field("ratio to the sampling engine", default=None)


@frozen(kw_only=True)
class PerToken:
    """Mean over all loss tokens of the global batch."""

    kind: ClassVar[str] = "per_token"
    denominator: Literal["own", "joint", "completions"] = spec_field(
        "which tokens to divide by: this term's, those of all terms with `joint`, or all completion tokens, counted or not",
        default="own",
    )


@frozen(kw_only=True)
class PerSequence:
    """Mean over each sequence's loss tokens, then over sequences."""

    kind: ClassVar[str] = "per_sequence"
    empty_rows: Literal["count", "skip"] = spec_field(
        "whether a sequence without loss tokens counts as zero or is left out", default="skip"
    )


@frozen(kw_only=True)
class SequenceSum:
    """Sum over each sequence, then mean over sequences."""

    kind: ClassVar[str] = "sequence_sum"


@frozen(kw_only=True)
class Constant:
    """Sum over all loss tokens, divided by the number of sequences × a constant length."""

    kind: ClassVar[str] = "constant"
    length: Scheduled = spec_field("the constant, tokens", range=POSITIVE)


@frozen(kw_only=True)
class Sum:
    """Plain sum.  The right learning rate then depends on batch size and completion length."""

    kind: ClassVar[str] = "sum"


Average = PerToken | PerSequence | SequenceSum | Constant | Sum


@frozen(kw_only=True)
class LossSpec:
    """One term of the objective: the tokens it counts, how it averages them, and its coefficient."""

    kind: ClassVar[str]
    mask: MaskSpec = spec_field("which completion tokens count", default=MaskSpec())
    average: Average = spec_field("how token losses are averaged", default=PerToken())
    coefficient: Scheduled = spec_field("factor of this term in the objective", default=1.0, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class WeightedLossSpec(LossSpec):
    """A loss term whose tokens can have different weights."""

    weight: Weight | None = spec_field("weight of each token (default: all equal)", default=None)


@frozen(kw_only=True)
class Distillation(WeightedLossSpec):
    """Pull the student's distribution towards the teacher's."""

    kind: ClassVar[str] = "distillation"
    divergence: Divergence = spec_field("divergence between student and teacher")
    support: Support = spec_field("tokens of the vocabulary to compare")
    clip: DivergenceClip = spec_field("bounds inside the divergence", default=DivergenceClip())
    temperature: Scheduled | None = spec_field(
        "temperature of both distributions (default: the sampling temperature)", default=None, range=TEMPERATURE
    )
    importance: ImportanceSpec = spec_field("importance corrections", default=ImportanceSpec())


@frozen(kw_only=True)
class CrossEntropy(WeightedLossSpec):
    """Raise the log-probability of the completion's tokens."""

    kind: ClassVar[str] = "cross_entropy"


@frozen(kw_only=True)
class ClipSpec:
    """Clipped surrogate −min(ρA, clip(ρ, 1 − low, 1 + high) A): no gradient once ρ has moved far enough in A's direction."""

    low: Scheduled = spec_field("lower clip: 1 − low", range=SHARE)
    high: Scheduled = spec_field("upper clip: 1 + high", range=NOT_NEGATIVE)
    dual: Scheduled | None = spec_field(
        "dual clip: for a negative advantage the loss is at most this many times its magnitude",
        default=None,
        range=ABOVE_ONE,
    )


@frozen(kw_only=True)
class PolicyImportance:
    """Importance correction for tokens sampled by another engine.  The ratio to the old policy is ρ itself."""

    sampler: SamplerRatio | None = spec_field("ratio to the sampling engine", default=None)


@frozen(kw_only=True)
class PolicyGradient(WeightedLossSpec):
    """Policy gradient: loss −ρA, with advantage A and ratio ρ of the current student to the student before this batch."""

    kind: ClassVar[str] = "policy_gradient"
    advantage: Advantage = spec_field("advantage of each token")
    ratio: Literal["token", "sequence"] = spec_field(
        "one ratio per token, or their geometric mean over the sequence", default="token"
    )
    clip: ClipSpec | None = spec_field("clipping of the ratio", default=None)
    importance: PolicyImportance = spec_field("importance corrections", default=PolicyImportance())


@frozen(kw_only=True)
class ReferenceKl(LossSpec):
    """KL(student‖reference) to the frozen start model, both under the student's own prompt.

    `k2` is ½ (log student − log reference)² at the sampled token; on the student's own samples its expected gradient is
    that of the KL.  `vocabulary` is the KL itself.  Other common estimators have the right value but the wrong gradient.
    """

    kind: ClassVar[str] = "reference_kl"
    estimator: Literal["k2", "vocabulary"] = spec_field("estimate from the sampled token, or sum over the vocabulary")


Loss = Distillation | CrossEntropy | PolicyGradient | ReferenceKl
"""The kinds of `LossSpec`, as a union for exhaustive `match` and for structuring."""


def needs_teacher(term: LossSpec) -> bool:
    """Whether the term's loss or advantage uses the teacher."""
    if isinstance(term, PolicyGradient):
        return teacher_part(term.advantage) is not None
    return isinstance(term, Distillation)


def nothing_without_teacher(term: LossSpec) -> bool:
    """Whether the term counts no tokens of a rollout that has no teacher prompt."""
    if isinstance(term, PolicyGradient):
        return isinstance(term.advantage, LogRatio)
    return isinstance(term, Distillation)


def widest_top_k(losses: Mapping[str, LossSpec]) -> int:
    """The largest k among the terms' top_k supports; 0 if there are none."""
    supports = [t.support for t in losses.values() if isinstance(t, Distillation)]
    return max((s.k for s in supports if isinstance(s, TopKSupport)), default=0)
