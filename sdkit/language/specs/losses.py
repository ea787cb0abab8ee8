"""Loss terms: divergence or advantage, support, mask, importance correction and averaging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.advantages import Advantage, describe_bounds
from sdkit.language.specs.divergences import Divergence, DivergenceClip
from sdkit.language.specs.fields import ABOVE_ONE, NOT_NEGATIVE, SHARE, TEMPERATURE, Scheduled, as_factor, spec_field
from sdkit.language.specs.loss_parts import Average, ImportanceSpec, MaskSpec, PerToken, SamplerRatio, Support
from sdkit.language.specs.token_weights import STATISTICS, Statistic, Weight


@frozen(kw_only=True)
class LossSpec(ABC):
    """One term of the objective: the tokens it counts, how it averages them, and its coefficient."""

    kind: ClassVar[str]
    mask: MaskSpec = spec_field("which completion tokens count", default=MaskSpec())
    average: Average = spec_field("how token losses are averaged", default=PerToken())
    coefficient: Scheduled = spec_field("factor of this term in the objective", default=1.0, range=NOT_NEGATIVE)

    @abstractmethod
    def describe(self, temperature: float) -> str:
        """Returns the text that `sdkit plan` shows, given the sampling temperature."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss or its advantage uses the teacher."""
        return False

    @property
    def needs_teacher_prompt(self) -> bool:
        """Whether it counts no tokens of a rollout that has no teacher prompt."""
        return any(statistic.startswith("teacher") for statistic, _ in self.statistics())

    @property
    def zero_when_equal(self) -> bool:
        """Whether its gradient is 0 where teacher and student have the same distribution."""
        return False

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether it compares log-probabilities with those before the first update on the batch."""
        return False

    @property
    def sampler_ratio(self) -> SamplerRatio | None:
        """The ratio to the sampling engine, if it has one."""
        return None

    @property
    def masking_floor(self) -> Scheduled | None:
        """The log-ratio below which it masks a token out, if it has one."""
        return None

    @property
    def token_weight(self) -> Weight | None:
        """The weight of its tokens; None if all weigh the same."""
        return None

    @property
    def turn_setting(self) -> tuple[str, ...] | None:
        """The path of the setting that needs completions of several turns, if there is one."""
        if self.mask.counts_observations:
            return ("mask", "roles")
        if self.mask.turns:
            return ("mask", "turns")
        return ("weight",) if self.token_weight and self.token_weight.needs_turns else None

    def statistics(self) -> Iterator[tuple[Statistic, tuple[str, ...]]]:
        """Yields each token statistic that its mask, weight or advantage needs, with the setting that needs it."""
        if self.mask.teacher_entropy_above is not None:
            yield "teacher_entropy", ("mask", "teacher_entropy_above")
        if self.mask.student_entropy_top is not None:
            yield "student_entropy", ("mask", "student_entropy_top")
        if self.masking_floor is not None:
            yield "student_logprobs", ("advantage", "below_floor")
            yield "teacher_logprobs", ("advantage", "below_floor")
        for statistic in self.token_weight.statistics if self.token_weight else ():
            yield statistic, ("weight",)


@frozen(kw_only=True)
class WeightedLossSpec(LossSpec):
    """A loss term whose tokens can have different weights."""

    weight: Weight | None = spec_field("weight of each token (default: all equal)", default=None)

    @property
    def token_weight(self) -> Weight | None:
        return self.weight

    def _describe_weight(self) -> str:
        return f", weighted by {self.weight.describe()}" if self.weight else ""


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

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_teacher_prompt(self) -> bool:
        return True

    @property
    def zero_when_equal(self) -> bool:
        return self.divergence.zero_when_equal and self.support.zero_when_equal

    @property
    def uses_old_logprobs(self) -> bool:
        return self.importance != ImportanceSpec()

    @property
    def sampler_ratio(self) -> SamplerRatio | None:
        return self.importance.sampler

    def describe(self, temperature: float) -> str:
        limits = "".join(f", {part}" for part in (*self.divergence.details, *self.clip.describe()))
        ratios = (self.importance.old_policy, self.importance.sampler)
        parts = [
            f"{as_factor(self.coefficient)}{self.divergence.describe()} over {self.support.describe()}{limits}",
            f"temperature {self.temperature or temperature:g}",
            f"{self.average.describe()}{self.mask.describe()}{self._describe_weight()}",
            *(ratio.describe() for ratio in ratios if ratio),
        ]
        return ", ".join(parts)


@frozen(kw_only=True)
class CrossEntropy(WeightedLossSpec):
    """Raise the log-probability of the completion's tokens."""

    kind: ClassVar[str] = "cross_entropy"

    def describe(self, temperature: float) -> str:
        whose = "completion's" if "assistant" in self.mask.roles else "observations'"
        text = f"cross entropy of the {whose} tokens{self.mask.describe()}, {self.average.describe()}"
        return f"{as_factor(self.coefficient)}{text}{self._describe_weight()}"


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

    def describe(self) -> str:
        """Returns the bounds in words."""
        dual = f" (dual {self.dual:g})" if self.dual is not None else ""
        return f"clipped to {describe_bounds(self.low, self.high)}{dual}"


@frozen(kw_only=True)
class PolicyImportance:
    """Importance correction for tokens sampled by another engine.  The ratio to the old policy is ρ itself."""

    sampler: SamplerRatio | None = spec_field("ratio to the sampling engine", default=None)


@frozen(kw_only=True)
class PolicyGradient(WeightedLossSpec):
    """Policy gradient: loss −ρA, with advantage A and ratio ρ of the current student to the student before this batch."""

    kind: ClassVar[str] = "policy_gradient"
    advantage: Advantage = spec_field("advantage of each token")
    ratio: Literal["token", "turn", "sequence"] = spec_field(
        "one ratio per token, or their geometric mean over the turn or the sequence", default="token"
    )
    clip: ClipSpec | None = spec_field("clipping of the ratio", default=None)
    importance: PolicyImportance = spec_field("importance corrections", default=PolicyImportance())

    @property
    def needs_teacher(self) -> bool:
        return self.advantage.log_ratio is not None

    @property
    def needs_teacher_prompt(self) -> bool:
        return self.advantage.group_relative is None or super().needs_teacher_prompt

    @property
    def zero_when_equal(self) -> bool:
        return self.advantage.zero_when_equal

    @property
    def uses_old_logprobs(self) -> bool:
        return True

    @property
    def sampler_ratio(self) -> SamplerRatio | None:
        return self.importance.sampler

    @property
    def masking_floor(self) -> Scheduled | None:
        part = self.advantage.log_ratio
        return part.masking_floor if part else None

    def describe(self, temperature: float) -> str:
        clip = f" {self.clip.describe()}" if self.clip else ""
        parts = [
            f"{as_factor(self.coefficient)}policy gradient, advantage {self.advantage.describe()}",
            f"ratio per {self.ratio}{clip}",
            f"{self.average.describe()}{self.mask.describe()}{self._describe_weight()}",
            *([self.importance.sampler.describe()] if self.importance.sampler else []),
        ]
        return ", ".join(parts)


@frozen(kw_only=True)
class ReferenceKl(LossSpec):
    """KL(student‖reference) to the frozen start model, both under the student's own prompt.

    `k2` is ½ (log student − log reference)² at the sampled token; on the student's own samples its expected gradient is
    that of the KL.  `vocabulary` is the KL itself.  Other common estimators have the right value but the wrong gradient.
    """

    kind: ClassVar[str] = "reference_kl"
    estimator: Literal["k2", "vocabulary"] = spec_field("estimate from the sampled token, or sum over the vocabulary")

    def describe(self, temperature: float) -> str:
        over = "estimated from the sampled token (k2)" if self.estimator == "k2" else "over the whole vocabulary"
        counted = f"{self.average.describe()}{self.mask.describe()}"
        return f"{as_factor(self.coefficient)}reverse KL(student‖start model) {over}, {counted}"


Loss = Distillation | CrossEntropy | PolicyGradient | ReferenceKl
"""The kinds of `LossSpec`, as a union for exhaustive `match` and for structuring."""


def required_statistics(losses: Mapping[str, LossSpec]) -> dict[Statistic, tuple[str, ...]]:
    """Returns each token statistic that the terms need, in a fixed order, with the settings that need it.

    A setting is written as its path: `losses.distil.weight`.
    """
    settings: dict[Statistic, list[str]] = {statistic: [] for statistic in STATISTICS}
    for name, term in losses.items():
        for statistic, key in term.statistics():
            settings[statistic].append(".".join(("losses", name, *key)))
    return {statistic: tuple(paths) for statistic, paths in settings.items() if paths}
