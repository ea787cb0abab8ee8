"""What must be measured of a rollout batch before its first update, and what asks for it.

One pass of the student, and one of the teacher where asked, gives each completion token the log-probability and the
entropy that masks and weights over the whole batch are made of.  Knows specs; the pass itself is in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, assert_never

from sdkit.language.specs import (
    Distillation,
    DriftWeight,
    ExperimentSpec,
    FileWeight,
    LossSpec,
    PassRateWeight,
    PerplexityWeight,
    PolicyGradient,
    PositionWeight,
    Schedule,
    TeacherEntropyWeight,
    Weight,
    WeightedLossSpec,
    nothing_without_teacher,
    teacher_part,
)

Statistic = Literal["student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy"]
STATISTICS: tuple[Statistic, ...] = (
    "student_logprobs",
    "student_entropy",
    "teacher_logprobs",
    "teacher_entropy",
)
Key = tuple[str, ...]
"""Where a setting stands below its term."""


def term_statistics(term: LossSpec) -> Iterator[tuple[Statistic, Key]]:
    """Each measure that the term's mask, weight or advantage is made of, with the setting that asks for it."""
    if term.mask.teacher_entropy_above is not None:
        yield "teacher_entropy", ("mask", "teacher_entropy_above")
    if term.mask.student_entropy_top is not None:
        yield "student_entropy", ("mask", "student_entropy_top")
    if floor_that_leaves_out(term) is not None:
        yield "student_logprobs", ("advantage", "below_floor")
        yield "teacher_logprobs", ("advantage", "below_floor")
    for measure in _weight_measures(weight_of(term)):
        yield measure, ("weight",)


def _weight_measures(weight: Weight | None) -> tuple[Statistic, ...]:
    match weight:
        case None | PositionWeight() | PassRateWeight():
            return ()
        case TeacherEntropyWeight():
            return ("teacher_entropy",)
        case DriftWeight():
            return ("student_logprobs", "teacher_logprobs")
        case PerplexityWeight(of="student"):
            return ("student_logprobs",)
        case PerplexityWeight():
            return ("teacher_logprobs",)
        case FileWeight(given=given):
            return tuple(m for m in STATISTICS if m in given)
        case _:
            assert_never(weight)


def required_statistics(losses: Mapping[str, LossSpec]) -> dict[Statistic, tuple[str, ...]]:
    """Each measure that the terms ask for, with the settings that do (`losses.distil.weight`), in fixed order."""
    found: dict[Statistic, list[str]] = {measure: [] for measure in STATISTICS}
    for name, term in losses.items():
        for measure, key in term_statistics(term):
            found[measure].append(".".join(("losses", name, *key)))
    return {measure: tuple(who) for measure, who in found.items() if who}


def needs_old_logprobs(spec: ExperimentSpec) -> bool:
    """Whether a term asks how likely its tokens were before the first of several updates on a batch."""
    corrected = any(
        isinstance(t, PolicyGradient)
        or (isinstance(t, Distillation) and (t.importance.old_policy or t.importance.sampler))
        for t in spec.losses.values()
    )
    return spec.training.updates_per_rollout > 1 and corrected


def needs_teacher_scores(term: LossSpec) -> bool:
    """Whether the term cannot do without the teacher: it counts no token of a rollout without a teacher prompt."""
    asked = (measure for measure, _ in term_statistics(term))
    return nothing_without_teacher(term) or any(measure.startswith("teacher") for measure in asked)


def weight_of(term: LossSpec) -> Weight | None:
    """What the term's tokens weigh; None where all weigh the same."""
    return term.weight if isinstance(term, WeightedLossSpec) else None


def floor_that_leaves_out(term: LossSpec) -> float | Schedule | None:
    """The log-ratio below which the term does not count a token, where it has one."""
    part = teacher_part(term.advantage) if isinstance(term, PolicyGradient) else None
    return part.floor if part and part.below_floor == "leave_out" else None


def uses_reward(term: LossSpec) -> Key | None:
    """The setting of the term's weight that needs the reward of training, where there is one."""
    match weight_of(term):
        case PassRateWeight():
            return ("weight",)
        case FileWeight(given=given) if "reward" in given:
            return ("weight", "given")
    return None
