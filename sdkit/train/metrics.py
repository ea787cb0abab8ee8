"""The metrics of one training step, over the rollouts of all ranks.

Each share or mean is a sum and a count on each rank; both are summed over ranks and then divided.  `time/*` and the
metrics of a weight transfer are those of this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch

from sdkit.batches import Rollout
from sdkit.distributed import collectives
from sdkit.language.columns import logs_chats
from sdkit.language.specs import OfRollouts, Slot, SuccessfulSibling
from sdkit.losses.policy_terms import group_relative
from sdkit.models.device import rank_device
from sdkit.plan.accelerators import accelerator_named
from sdkit.spans import DEMONSTRATION, Ending
from sdkit.train.collect_rollouts import CollectedRollouts, completion_text
from sdkit.train.inputs import RunData
from sdkit.train.step import StepResult

HEDGES = ("wait", "hmm", "actually", "maybe", "perhaps")
Sums = dict[str, tuple[float, float]]
"""By metric: this rank's sum, and the count to divide it by."""


def step_metrics(
    data: RunData,
    collected: CollectedRollouts,
    results: Sequence[StepResult],
    filter_shares: Mapping[str, float],
    trained: int,
    version: int,
    seconds: float,
) -> dict[str, float]:
    """Return every metric of a step.

    `filter_shares` is the share of rollouts that passes each filter; `trained` is the number that passes all of them;
    `version` is the policy version after the step.  Trajectories that ended before the student took over count only in
    `rollout/kept`, `keep/*`, and their endings.
    """
    rollouts = [r for r in collected.batch if r.is_by_student]
    sampled = len(collected.batch)
    metrics = _average_updates(results)
    metrics |= _divide_sums(
        {
            f"reward/{name}": _mean(v for v, r in zip(values, collected.batch, strict=True) if r.is_by_student)
            for name, values in collected.scores.items()
        }
        | {f"keep/{name}": (share * sampled, sampled) for name, share in filter_shares.items()}
        | {"rollout/kept": (trained, sampled), "rollout/hedging": _hedging(data, rollouts)}
        | _rollout_sums(data, rollouts)
        | _trajectory_sums(data, rollouts)
        | _ending_sums(data, list(collected.batch))
        | _entropy_sum(data, collected)
        | _group_sums(data, rollouts)
        | _context_sums(data.spec.slots, rollouts)
        | _writer_sums(data, rollouts)
    )
    metrics |= {
        "skipped_steps": float(sum(not result.applied for result in results)),
        "policy_version": float(version),
        **{f"rollout/{name}": value for name, value in collected.figures.items()},
    }
    own_tokens = sum(len(r.sampled) for r in rollouts)
    return metrics | _times(collected, results, own_tokens, seconds) | _rates(results, data.spec.model.dtype)


def _average_updates(results: Sequence[StepResult]) -> dict[str, float]:
    """Return the mean of each metric over the step's updates; each update's metrics cover all ranks already."""
    metrics: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value / len(results)
    return metrics


def _divide_sums(sums: Sums) -> dict[str, float]:
    """Return sums divided by counts, both over all ranks; a sum with a count of 0 stays a sum.

    Every rank must have the same metrics, in the same order.
    """
    pairs = torch.tensor(list(sums.values()), dtype=torch.float64)
    totals = zip(sums, collectives.all_reduce_sum(pairs).tolist(), strict=True)
    return {name: total / max(count, 1.0) for name, (total, count) in totals}


def _rollout_sums(data: RunData, rollouts: Sequence[Rollout]) -> Sums:
    sums = {
        "rollout/tokens": (float(sum(len(r.sampled) for r in rollouts)), 0.0),
        "rollout/completion_tokens": _mean(len(r.sampled) for r in rollouts),
        "rollout/finished": _mean(r.finished for r in rollouts),
        "rollout/with_teacher": _mean(r.teacher_prompt_ids is not None for r in rollouts),
    }
    if data.spec.rollout.sampled_by.completion_column:
        from_data = [r for r in rollouts if r.sampler_logprobs is None]
        sums["rollout/cut_completions"] = _mean(not r.finished for r in from_data)
    if data.reward is not None and group_relative(data.spec.losses) is not None:
        sums["rollout/no_advantage"] = _mean(not r.advantage for r in rollouts)
    return sums


def _trajectory_sums(data: RunData, rollouts: Sequence[Rollout]) -> Sums:
    """Turns and observations of trajectories."""
    if data.spec.environment is None and not logs_chats(data.spec):
        return {}
    turns = float(sum(span.sampled for r in rollouts for span in r.spans))
    views = float(sum(len(r.views) for r in rollouts))
    return {
        **({"trajectory/turns_with_teacher": (views, turns)} if data.context_by_turn else {}),
        "trajectory/turns": _mean(sum(span.sampled for span in r.spans) or 1 for r in rollouts),
        "trajectory/observation_tokens": _mean(
            sum(span.end - span.start for span in r.spans if not span.is_turn) for r in rollouts
        ),
    }


def _ending_sums(data: RunData, rollouts: Sequence[Rollout]) -> Sums:
    """Why trajectories ended, and what they started with; empty without an environment."""
    if data.spec.environment is None:
        return {}
    endings = {f"trajectory/ending_{name}": _mean(r.ending == name for r in rollouts) for name in get_args(Ending)}
    if data.spec.rollout.starts_with is None:
        return endings
    demonstrated = [sum(span.role == DEMONSTRATION for span in r.spans) for r in rollouts]
    return {
        **endings,
        "trajectory/demonstrated_turns": _mean(demonstrated),
        "trajectory/ended_in_demonstration": _mean(not r.is_by_student for r in rollouts),
    }


def _entropy_sum(data: RunData, collected: CollectedRollouts) -> Sums:
    """The mean of −log-probability over all sampled tokens; empty if the data set has the completions."""
    if data.spec.rollout.sampled_by.completion_column and not collected.figures.get("by_student"):
        return {}
    logprobs = [r.sampler_logprobs[p] for r in collected.batch if r.sampler_logprobs for p in r.sampled]
    return {"rollout/entropy": (-sum(logprobs), float(len(logprobs)))}


def _group_sums(data: RunData, rollouts: Sequence[Rollout]) -> Sums:
    """The share of groups whose rollouts all have the same reward, if groups have several rollouts."""
    if data.reward is None or data.spec.rollout.completions_per_prompt < 2:
        return {}
    groups = {r.group: r.group_rewards for r in rollouts}
    return {"rollout/constant_groups": _mean(len(set(g)) == 1 for g in groups.values())}


def _context_sums(slots: Mapping[str, Slot], rollouts: Sequence[Rollout]) -> Sums:
    """The share of rollouts whose teacher prompt fills each slot, and of groups with a successful rollout."""
    sums: Sums = {}
    for name, slot in slots.items():
        if isinstance(slot, OfRollouts):
            sums[f"teacher/{name}_used"] = _mean(name in r.filled_slots for r in rollouts)
        if isinstance(slot, SuccessfulSibling):
            has_success: dict[int, bool] = {}
            for r in rollouts:
                success = r.reward is not None and r.reward >= slot.threshold
                has_success[r.group] = has_success.get(r.group, False) or success
            sums["teacher/success_groups"] = _mean(has_success.values())
    return sums


def _writer_sums(data: RunData, rollouts: Sequence[Rollout]) -> Sums:
    """The share of rollouts about which the context's writer failed, of those that it was asked about."""
    if data.spec.writer is None:
        return {}
    return {"teacher/writer_failed": _mean(r.written == "" for r in rollouts if r.written is not None)}


def _hedging(data: RunData, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Hedging words per hundred words (arXiv 2603.24472 links losing them to worse reasoning on other tasks)."""
    texts = [completion_text(data, r.sampled_ids) for r in rollouts]
    words = [w.strip(".,!?:;").lower() for text in texts for w in text.split()]
    return 100.0 * sum(w in HEDGES for w in words), len(words)


def _times(
    collected: CollectedRollouts, results: Sequence[StepResult], tokens: int, seconds: float
) -> dict[str, float]:
    times = dict(collected.seconds)
    for result in results:
        for name, value in result.seconds.items():
            times[name] = times.get(name, 0.0) + value
    metrics = {f"time/{name}": value for name, value in times.items()} | {"time/step": seconds}
    sampling = collected.seconds.get("sampler", collected.seconds["rollout"])
    if sampling > 0:
        metrics["time/tokens_per_second"] = tokens / sampling
    return metrics


def _rates(results: Sequence[StepResult], dtype: str) -> dict[str, float]:
    """How fast this rank scored and updated: completion tokens and operations per second.

    `time/mfu` is the share of the device's peak rate in `dtype`, left out where that rate is not known.
    """
    seconds = sum(sum(result.seconds.values()) for result in results)
    if seconds <= 0:
        return {}
    metrics = {"time/trained_tokens_per_second": sum(result.tokens for result in results) / seconds}
    teraflops = sum(result.operations for result in results) / seconds / 1e12
    if math.isfinite(teraflops):
        metrics["time/teraflops"] = teraflops
        if peak := peak_teraflops(dtype):
            metrics["time/mfu"] = teraflops / peak
    return metrics


def peak_teraflops(dtype: str) -> float | None:
    """The published dense rate of this process's GPU in `dtype`; None without a GPU, or if it is not known."""
    device = rank_device()
    accelerator = accelerator_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return accelerator.teraflops if accelerator and accelerator.dtype == dtype else None


def _mean(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return float(sum(listed)), float(len(listed))
