"""The parts of loss terms: supports, masks, importance ratios and averages."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    PATTERN,
    POSITIVE,
    TOP_P,
    Component,
    Schedule,
    Scheduled,
    between,
    spec_field,
)


class BaseSupport(Component):
    """What the loss terms and rules ask of a support."""

    __slots__ = ()

    @property
    def top_k(self) -> int:
        """How many of the likeliest tokens it needs from each side; 0 if it is no top-k support."""
        return 0

    @property
    def zero_when_equal(self) -> bool:
        """Whether a divergence of equal distributions has no gradient on it."""
        return True


@frozen(kw_only=True)
class VocabularySupport(BaseSupport):
    """The whole vocabulary."""

    kind: ClassVar[str] = "vocabulary"
    description: ClassVar[str] = "the whole vocabulary"


@frozen(kw_only=True)
class TopKSupport(BaseSupport):
    """The k likeliest tokens; `remainder` says what happens to the rest of the probability."""

    kind: ClassVar[str] = "top_k"
    k: int = spec_field("number of tokens", range=AT_LEAST_ONE)
    chosen_by: Literal["student", "teacher", "union"] = spec_field("whose likeliest tokens to take")
    remainder: Literal["tail_bucket", "renormalize", "renormalize_teacher", "drop"] = spec_field(
        "what to do with the probability outside the k tokens"
    )

    @property
    def top_k(self) -> int:
        return self.k

    @property
    def zero_when_equal(self) -> bool:
        return self.remainder not in ("renormalize_teacher", "drop")  # they pull probability into the support

    def describe(self) -> str:
        whose = "both sides'" if self.chosen_by == "union" else f"the {self.chosen_by}'s"
        return f"{whose} top {self.k} tokens ({self.remainder.replace('_', ' ')})"


@frozen(kw_only=True)
class SampledTokenSupport(BaseSupport):
    """The sampled token alone, which estimates the gradient of the reverse KL."""

    kind: ClassVar[str] = "sampled_token"
    description: ClassVar[str] = "the sampled token"


Support = VocabularySupport | TopKSupport | SampledTokenSupport


Role = Literal["assistant", "user", "tool"]


@frozen(kw_only=True)
class TurnRange:
    """Turns of a trajectory, counted from 1; what follows a turn belongs to it."""

    first: int = spec_field("the first turn that counts", default=1, key="from", range=AT_LEAST_ONE)
    last: Scheduled | None = spec_field(
        "the last turn that counts, rounded down if a schedule is between two (default: the trajectory's last)",
        default=None,
        key="to",
        range=between(1.0, 1e6),
    )

    def describe(self) -> str:
        """Returns the turns in words."""
        if self.last is None:
            return f"from turn {self.first} on"
        if isinstance(self.last, Schedule):
            return f"turns {self.first} to ({self.last:g})"
        return f"turn {self.first}" if self.first == self.last else f"turns {self.first} to {self.last:g}"


@frozen(kw_only=True)
class TextSpans:
    """The parts of each turn's text that a regular expression matches.

    The pattern searches every turn, and every observation, by itself, in its text without special tokens.  A match counts
    where its groups are, or all of it if the pattern has none; so does a token that touches it with one character.  An
    unclosed part is one that the pattern lets end with the text: `<action>(.+?)(?:</action>|$)`.
    """

    pattern: str = spec_field("Python regular expression", range=PATTERN)
    count: Literal["inside", "outside"] = spec_field(
        "count the tokens that touch a match, or all others", default="inside"
    )

    def describe(self) -> str:
        """Returns the pattern in words."""
        return f"only tokens {self.count} of {self.pattern}"


@frozen(kw_only=True)
class MaskSpec:
    """Which completion tokens a term counts.  Masked tokens stay visible to attention."""

    roles: tuple[Role, ...] = spec_field(
        "whose text counts: what the student sampled (`assistant`), or the text that it was shown after a turn",
        default=("assistant",),
        range=NOT_EMPTY,
    )
    turns: TurnRange | None = spec_field("which turns count (default: all)", default=None)
    spans: TextSpans | None = spec_field("count only parts of the text that match a pattern", default=None)
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

    @property
    def counts_observations(self) -> bool:
        """Whether tokens that the student did not sample count."""
        return any(role != "assistant" for role in self.roles)

    def describe(self) -> str:
        """Returns the settings in words, each after a comma; empty if every sampled token counts."""
        parts = [
            f"only the text of {' and '.join(self.roles)}" * self.counts_observations,
            f"only {self.turns.describe()}" if self.turns else "",
            self.spans.describe() if self.spans else "",
            f"first {self.skip_first} tokens left out" * bool(self.skip_first),
            f"only the first {self.prefix} tokens" * bool(self.prefix),
            "special tokens left out" * (self.special_tokens == "leave_out"),
        ]
        if self.teacher_entropy_above is not None:
            parts.append(f"only where the teacher's entropy exceeds {self.teacher_entropy_above:g}")
        if (top := self.student_entropy_top) is not None:
            share = f"share {top:g}" if isinstance(top, Schedule) else f"{100 * top:g} %"
            parts.append(f"only the {share} of tokens with the student's largest entropies")
        return "".join(f", {part}" for part in parts if part)


@frozen(kw_only=True)
class OldPolicyRatio:
    """Per-token ratio of the current student to the student that sampled the batch."""

    cap: Scheduled = spec_field("upper bound", range=POSITIVE)

    def describe(self) -> str:
        """Returns the ratio in words."""
        return f"ratio to the old policy capped at {self.cap:g}"


@frozen(kw_only=True)
class SamplerRatio:
    """Ratio of the trainer's probabilities to the sampling engine's."""

    cap: Scheduled = spec_field("upper bound", range=POSITIVE)
    level: Literal["token", "sequence_mean"] = spec_field("one ratio per token, or its mean over the sequence")

    def describe(self) -> str:
        """Returns the ratio in words."""
        return f"ratio to the sampler ({self.level.replace('_', ' ')}) capped at {self.cap:g}"


@frozen(kw_only=True)
class ImportanceSpec:
    """Importance corrections for tokens sampled by other weights or another engine."""

    old_policy: OldPolicyRatio | None = spec_field("ratio to the weights before this batch", default=None)
    sampler: SamplerRatio | None = spec_field("ratio to the sampling engine", default=None)


@frozen(kw_only=True)
class PerToken(Component):
    """Mean over all loss tokens of the global batch."""

    kind: ClassVar[str] = "per_token"
    denominator: Literal["own", "joint", "completions"] = spec_field(
        "which tokens to divide by: this term's, those of all terms with `joint`, or all completion tokens, counted or not",
        default="own",
    )

    def describe(self) -> str:
        match self.denominator:
            case "own":
                return "mean over tokens"
            case "joint":
                return "sum over tokens / tokens of all terms that say joint"
            case "completions":
                return "sum over tokens / tokens of all completions"


@frozen(kw_only=True)
class PerSequence(Component):
    """Mean over each sequence's loss tokens, then over sequences."""

    kind: ClassVar[str] = "per_sequence"
    empty_rows: Literal["count", "skip"] = spec_field(
        "whether a sequence without loss tokens counts as zero or is left out", default="skip"
    )

    def describe(self) -> str:
        empty = "count" if self.empty_rows == "count" else "skipped"
        return f"mean over each sequence, then sequences (empty ones {empty})"


@frozen(kw_only=True)
class PerTurn(Component):
    """Mean over each turn's loss tokens, then over all turns; with one turn a completion, as `per_sequence`."""

    kind: ClassVar[str] = "per_turn"
    description: ClassVar[str] = "mean over each turn, then turns (empty ones skipped)"


@frozen(kw_only=True)
class SequenceSum(Component):
    """Sum over each sequence, then mean over sequences."""

    kind: ClassVar[str] = "sequence_sum"
    description: ClassVar[str] = "sum over each sequence, mean over sequences"


@frozen(kw_only=True)
class Constant(Component):
    """Sum over all loss tokens, divided by the number of sequences × a constant length."""

    kind: ClassVar[str] = "constant"
    description: ClassVar[str] = "sum over tokens / (sequences × {0.length:g})"
    length: Scheduled = spec_field("the constant, tokens", range=POSITIVE)


@frozen(kw_only=True)
class Sum(Component):
    """Plain sum.  The right learning rate then depends on batch size and completion length."""

    kind: ClassVar[str] = "sum"
    description: ClassVar[str] = "sum over tokens"


Average = PerToken | PerSequence | PerTurn | SequenceSum | Constant | Sum
