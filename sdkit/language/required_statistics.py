"""Token statistics that the loss terms need before the first update on a rollout batch.

One forward pass of the student, and one of the teacher if needed, computes the log-probability and the entropy of
each completion token.  Masks and weights that depend on the whole batch are computed from these.  This file knows
specs only; `train/token_statistics.py` runs the passes.
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
    TeacherEntropyWeight,
    Weight,
    WeightedLossSpec,
    nothing_without_teacher,
    teacher_part,
)

Statistic = Literal["student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy"]
STATISTICS: tuple[Statistic, ...] = ("student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy")
Key = tuple[str, ...]
"""The path of a setting below its term."""


def term_statistics(term: LossSpec) -> Iterator[tuple[Statistic, Key]]:
    """Yields each statistic that the term's mask, weight or advantage needs, with the setting that needs it."""
    if term.mask.teacher_entropy_above is not None:
        yield "teacher_entropy", ("mask", "teacher_entropy_above")
    if term.mask.student_entropy_top is not None:
        yield "student_entropy", ("mask", "student_entropy_top")
    if masking_floor(term) is not None:
        yield "student_logprobs", ("advantage", "below_floor")
        yield "teacher_logprobs", ("advantage", "below_floor")
    for statistic in _weight_statistics(weight_of(term)):
        yield statistic, ("weight",)


def _weight_statistics(weight: Weight | None) -> tuple[Statistic, ...]:
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
            return tuple(s for s in STATISTICS if s in given)
        case _:
            assert_never(weight)


def required_statistics(losses: Mapping[str, LossSpec]) -> dict[Statistic, tuple[str, ...]]:
    """Returns each statistic that the terms need, in a fixed order, with the settings that need it.

    A setting is written as its path: `losses.distil.weight`.
    """
    settings: dict[Statistic, list[str]] = {statistic: [] for statistic in STATISTICS}
    for name, term in losses.items():
        for statistic, key in term_statistics(term):
            settings[statistic].append(".".join(("losses", name, *key)))
    return {statistic: tuple(paths) for statistic, paths in settings.items() if paths}


def needs_old_logprobs(spec: ExperimentSpec) -> bool:
    """Whether a term needs the log-probabilities of its tokens before the first of several updates on a batch."""
    has_ratio = any(
        isinstance(t, PolicyGradient)
        or (isinstance(t, Distillation) and (t.importance.old_policy or t.importance.sampler))
        for t in spec.losses.values()
    )
    return spec.training.updates_per_rollout > 1 and has_ratio


def needs_teacher_scores(term: LossSpec) -> bool:
    """Whether the term needs teacher scores, so that it skips rollouts without a teacher prompt."""
    statistics = (statistic for statistic, _ in term_statistics(term))
    return nothing_without_teacher(term) or any(s.startswith("teacher") for s in statistics)


def weight_of(term: LossSpec) -> Weight | None:
    """Returns the token weight of the term; None if all tokens weigh the same."""
    return term.weight if isinstance(term, WeightedLossSpec) else None


def masking_floor(term: LossSpec) -> float | None:
    """Returns the log-ratio below which the term masks a token out, if it has one."""
    part = teacher_part(term.advantage) if isinstance(term, PolicyGradient) else None
    return part.floor if part and part.below_floor == "leave_out" else None


def reward_setting(term: LossSpec) -> Key | None:
    """Returns the setting of the term's weight that needs the training reward, if there is one."""
    match weight_of(term):
        case PassRateWeight():
            return ("weight",)
        case FileWeight(given=given) if "reward" in given:
            return ("weight", "given")
    return None
