"""The figures of one training step, over the rollouts of all ranks.

A share or a mean is a sum and a count on each rank, both summed over ranks before they are divided.  `time/*`, and what a
backend tells of a weight transfer, are this process's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sdkit.batches import Rollout
from sdkit.distributed import collectives
from sdkit.language.specs import OfRollouts, SuccessfulSibling, completion_column
from sdkit.losses.policy_terms import group_relative
from sdkit.train.collect_rollouts import CollectedRollouts, completion_text
from sdkit.train.step import StepResult

if TYPE_CHECKING:
    from sdkit.train.state import TrainState

HEDGES = ("wait", "hmm", "actually", "maybe", "perhaps")
Sums = dict[str, tuple[float, float]]
"""Of each figure, a sum and what it is divided by, on this rank."""


def step_metrics(
    state: TrainState,
    gathered: CollectedRollouts,
    measured: Sequence[StepResult],
    passed: Mapping[str, float],
    kept: int,
    seconds: float,
) -> dict[str, float]:
    """Every figure of a step; `passed` are the shares that pass each filter, `kept` the rollouts that pass all."""
    rollouts = list(gathered.batch)
    whole = len(rollouts)
    metrics = _average_updates(measured)
    metrics |= _divide_sums(
        state,
        {f"reward/{name}": _mean(values) for name, values in gathered.scores.items()}
        | {f"keep/{name}": (share * whole, whole) for name, share in passed.items()}
        | {"rollout/kept": (kept, whole), "rollout/hedging": _hedging(state, rollouts)}
        | _rollout_sums(state, rollouts)
        | _group_sums(state, rollouts)
        | _context_sums(state, rollouts),
    )
    metrics |= {
        "skipped_steps": float(sum(not part.applied for part in measured)),
        "policy_version": float(state.optimizer_steps),
        **{f"rollout/{name}": value for name, value in gathered.figures.items()},
    }
    own_tokens = sum(len(r.completion_ids) for r in rollouts)
    return metrics | _times(gathered, measured, own_tokens, seconds)


def _average_updates(measured: Sequence[StepResult]) -> dict[str, float]:
    """The mean over the step's updates of what each measured, which is over all ranks already."""
    metrics: dict[str, float] = {}
    for part in measured:
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value / len(measured)
    return metrics


def _divide_sums(state: TrainState, sums: Sums) -> dict[str, float]:
    """Sums of all ranks over counts of all ranks; what has a count of 0 stays a sum.  Every rank has the same names."""
    pairs = torch.tensor(list(sums.values()), dtype=torch.float64, device=state.device)
    totals = zip(sums, collectives.all_reduce_sum(pairs).tolist(), strict=True)
    return {name: total / max(count, 1.0) for name, (total, count) in totals}


def _rollout_sums(state: TrainState, rollouts: Sequence[Rollout]) -> Sums:
    sums = {
        "rollout/tokens": (float(sum(len(r.completion_ids) for r in rollouts)), 0.0),
        "rollout/completion_tokens": _mean(len(r.completion_ids) for r in rollouts),
        "rollout/finished": _mean(r.finished for r in rollouts),
        "rollout/with_teacher": _mean(r.teacher_prompt_ids is not None for r in rollouts),
    }
    if completion_column(state.spec.rollout.sampled_by):
        own = [r for r in rollouts if r.sampler_logprobs is None]
        sums["rollout/cut_completions"] = _mean(not r.finished for r in own)
    if state.data.reward is not None and group_relative(state.losses) is not None:
        sums["rollout/no_advantage"] = _mean(not r.advantage for r in rollouts)
    return sums


def _group_sums(state: TrainState, rollouts: Sequence[Rollout]) -> Sums:
    """Share of groups whose rollouts all got one reward, where groups have several."""
    if state.data.reward is None or state.spec.rollout.completions_per_prompt < 2:
        return {}
    groups = {r.group: r.group_rewards for r in rollouts}
    return {"rollout/constant_groups": _mean(len(set(g)) == 1 for g in groups.values())}


def _context_sums(state: TrainState, rollouts: Sequence[Rollout]) -> Sums:
    """Share of rollouts whose teacher was shown each slot, and of groups with a success in them."""
    teacher = state.spec.teacher
    slots = teacher.sees.slots if teacher and teacher.sees else {}
    sums: Sums = {}
    for name, slot in slots.items():
        if isinstance(slot, OfRollouts):
            sums[f"teacher/{name}_used"] = _mean(name in r.filled_slots for r in rollouts)
        if isinstance(slot, SuccessfulSibling):
            groups: dict[int, bool] = {}
            for r in rollouts:
                won = r.reward is not None and r.reward >= slot.threshold
                groups[r.group] = groups.get(r.group, False) or won
            sums["teacher/success_groups"] = _mean(groups.values())
    return sums


def _hedging(state: TrainState, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Hedging words per hundred words (2603.24472 ties their loss to worse reasoning elsewhere)."""
    texts = [completion_text(state, r.completion_ids) for r in rollouts]
    words = [w.strip(".,!?:;").lower() for text in texts for w in text.split()]
    return 100.0 * sum(w in HEDGES for w in words), len(words)


def _times(
    gathered: CollectedRollouts, measured: Sequence[StepResult], tokens: int, seconds: float
) -> dict[str, float]:
    times = dict(gathered.seconds)
    for part in measured:
        for name, value in part.seconds.items():
            times[name] = times.get(name, 0.0) + value
    found = {f"time/{name}": value for name, value in times.items()} | {"time/step": seconds}
    sampling = gathered.seconds.get("sampler", gathered.seconds["rollout"])
    if sampling > 0:
        found["time/tokens_per_second"] = tokens / sampling
    return found


def _mean(values: Iterable[float]) -> tuple[float, float]:
    held = list(values)
    return float(sum(held)), float(len(held))
