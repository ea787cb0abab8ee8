"""One optimizer step, from prepared rollouts to new weights.

To follow a step, read this file, `collate.py` (rollouts to micro-batches) and `losses/objective.py` (the mathematics).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from sdkit.batches import MicroBatch, RolloutBatch
from sdkit.distributed import collectives
from sdkit.language.specs import Loss, Table, TeacherWeights
from sdkit.losses.objective import TOKEN_DIVERGENCE
from sdkit.models.operations import pass_operations
from sdkit.models.teachers import Event
from sdkit.plan.operations import training_factor
from sdkit.train.collate import CollatedBatch, RolloutKey, collate, counted_positions, empty_micro_batch, rollout_key
from sdkit.train.learner import Learner
from sdkit.train.step_specs import StepSpecs
from sdkit.train.stopwatch import Stopwatch


@frozen(kw_only=True)
class StepResult:
    """The metrics of one optimizer step, what this rank computed for it, and whether it was applied."""

    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # of scoring (`teacher`) and of the rest (`update`)
    operations: float  # of both; nan if a model's are not known
    tokens: int  # sampled ones
    applied: bool  # False if a gradient was not finite
    # By rollout of this rank: the divergence at each token of its completion, None where no term counts it.
    divergences: Mapping[RolloutKey, Sequence[float | None]] = field(factory=dict)


class LossNotFinite(Exception):
    """The loss of an optimizer step is inf or nan; the step was not applied."""


def train_step(learner: Learner, rollouts: RolloutBatch, specs: StepSpecs) -> StepResult:
    """Accumulate gradients over all micro-batches, apply one optimizer step, and update the teacher.

    `rollouts` come from `token_statistics.prepare_rollouts`.  Raises LossNotFinite on every rank, before the step.
    """
    collated = _collate(learner, rollouts, specs.losses)
    sums: dict[str, Tensor] = {}
    divergences: list[Tensor] = []
    stopwatch = Stopwatch(learner.models.device)
    for batch in collated.micro_batches:
        with stopwatch.phase("teacher"):
            reference = learner.scorer.score_reference(batch)
            scores = learner.scorer.score_teacher(batch, specs.blend, reference)
        with stopwatch.phase("update"):
            loss, stats = learner.zero.forward(learner.student, batch, scores, reference, specs.losses)
            learner.zero.backward(loss)
            divergences += [stats.pop(TOKEN_DIVERGENCE)] if TOKEN_DIVERGENCE in stats else []
            _accumulate(sums, stats, batch)
    with stopwatch.phase("update"):
        metrics = average_metrics(sums, collated)
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise LossNotFinite
        stepped = learner.zero.step(specs.lr)
    metrics |= {"grad_norm": stepped.grad_norm, "lr": specs.lr, **specs.scheduled}
    if stepped.applied:
        metrics |= update_teacher(learner, specs.next_teacher, "optimizer_step", specs.optimizer_steps + 1)
    return StepResult(
        metrics=metrics,
        seconds=stopwatch.seconds(),
        operations=sum(_operations(learner, batch, specs) for batch in collated.micro_batches),
        tokens=sum(len(rollout.sampled) for rollout in collated.order),
        applied=stepped.applied,
        divergences=_divergences(divergences, collated, specs.losses),
    )


def _operations(learner: Learner, batch: MicroBatch, specs: StepSpecs) -> float:
    """Return the operations that scoring a micro-batch and the update on it need, without recomputed activations."""
    student = learner.models.student
    update = training_factor(adapters=student.has_adapters) * pass_operations(student, batch.student.texts)
    return learner.scorer.operations(batch, specs.blend) + update


def _divergences(
    parts: Sequence[Tensor], collated: CollatedBatch, losses: Table[Loss]
) -> dict[RolloutKey, list[float | None]]:
    """Return the divergence at each completion token of the rollouts; `parts` are those of the micro-batches, [M] each."""
    if not parts:
        return {}
    values = iter(torch.cat(list(parts)).tolist())
    by_rollout: dict[RolloutKey, list[float | None]] = {}
    for rollout in collated.order:
        counted = dict(zip(counted_positions(rollout, losses), values, strict=False))
        by_rollout[rollout_key(rollout)] = [counted.get(position) for position in range(len(rollout.completion_ids))]
    return by_rollout


@torch.no_grad()
def evaluate_objective(learner: Learner, rollouts: RolloutBatch, specs: StepSpecs) -> dict[str, float]:
    """Return every metric of the objective on these prepared rollouts, without a step."""
    collated = _collate(learner, rollouts, specs.losses)
    sums: dict[str, Tensor] = {}
    for batch in collated.micro_batches:
        reference = learner.scorer.score_reference(batch)
        scores = learner.scorer.score_teacher(batch, specs.blend, reference)
        forward = learner.models.student.sharding.run_forward
        _, stats = forward(learner.student, batch, scores, reference, specs.losses)
        _accumulate(sums, stats, batch)
    return average_metrics(sums, collated)


def _collate(learner: Learner, rollouts: RolloutBatch, losses: Table[Loss]) -> CollatedBatch:
    """Return this rank's micro-batches, with empty ones added up to the largest number on any rank."""
    budget, device, longest_pack = learner.micro_batch_tokens, learner.models.device, learner.models.longest_pack
    collated = collate(list(rollouts), losses, budget, collectives.all_reduce_sum, device, longest_pack)
    teacher = any(term.needs_teacher for term in losses.values())
    missing = collectives.all_reduce_max(len(collated.micro_batches)) - len(collated.micro_batches)
    padding = [empty_micro_batch(losses, teacher=teacher, device=device)] * missing
    return evolve(collated, micro_batches=(*collated.micro_batches, *padding))


def average_metrics(sums: Mapping[str, Tensor], collated: CollatedBatch) -> dict[str, float]:
    """Return means over each term's tokens from sums over tokens; losses are sums, already weighted.

    All sums leave the device in one transfer.
    """
    values = collectives.sum_scalars(sums)
    if not values:
        return {}
    metrics = token_means(values) | _route_shares(collated)
    tokens = sum(b.student.tokens for b in collated.micro_batches)
    all_tokens, all_padded = collectives.all_reduce_sum(torch.tensor([tokens, collated.padded_tokens])).tolist()
    metrics["padding"] = 1 - all_tokens / max(all_padded, 1)
    for name, counts in collated.counts.items():
        metrics[f"{name}/tokens"] = counts.tokens
        metrics[f"{name}/empty_rows"] = 1 - counts.filled_rows / max(counts.rows, 1)
    return metrics


def token_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the loss, each term's share of it, and the mean of every other metric over its term's tokens."""
    metrics = {"loss": sum(v for k, v in sums.items() if k.startswith("loss/"))}
    for key, value in sums.items():
        name, _, figure = key.partition("/")
        if name == "loss":
            metrics[key] = value
        elif figure != "tokens":
            # Tokens of weight 0 count in the loss's average but not here.
            metrics[key] = value / max(sums[f"{name}/tokens"], 1)
    return metrics


def _route_shares(collated: CollatedBatch) -> dict[str, float]:
    """Return the share of rollouts on each branch of the route, if the spec has one."""
    branches = ("then", "otherwise")
    own_counts = [sum(r.branch == branch for r in collated.order) for branch in branches]
    counts = collectives.all_reduce_sum(torch.tensor(own_counts)).tolist()
    total = sum(counts)
    if not total:
        return {}
    return {f"route/{name}": n / total for name, n in zip(branches, counts, strict=True)}


def update_teacher(learner: Learner, spec: TeacherWeights | None, after: Event, updates: int) -> dict[str, float]:
    """Let the teacher follow the student; returns its new distance, if it changed.  `spec` has no schedules."""
    teacher = learner.models.teacher
    if teacher and spec and teacher.follow(learner.masters, spec, after, updates):
        return {"teacher_distance": teacher.distance}
    return {}


def _accumulate(sums: dict[str, Tensor], stats: Mapping[str, Tensor], batch: MicroBatch) -> None:
    if not batch.rows:
        return
    for key, value in stats.items():
        sums[key] = value if key not in sums else sums[key] + value
