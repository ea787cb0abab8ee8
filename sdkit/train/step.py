"""One optimizer step: the order of events from a rollout batch to new weights.

A reader of this file needs `collate.py` (rollouts → micro-batches) and `losses/objective.py` (the mathematics), no more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from sdkit.batches import LogitTransform, MicroBatch, RolloutBatch, TeacherScores, Tokens
from sdkit.distributed import collectives
from sdkit.language.schedules import scalar_at, schedules
from sdkit.language.specs import Loss, OptimizerSpec, Table, needs_teacher
from sdkit.losses.chunks import (
    projected_loss,
    scored_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from sdkit.losses.objective import Objective, UserDivergence, sampler_ratio
from sdkit.losses.policy_terms import sequence_means
from sdkit.models.weights import Weights
from sdkit.train.collate import CollatedBatch, collate, empty_micro_batch
from sdkit.train.teacher_scores import score_reference, score_teacher

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@frozen(kw_only=True)
class StepResult:
    """What one optimizer step, or one evaluation of the objective, measured."""

    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    applied: bool


class LossNotFinite(Exception):
    """The loss of an optimizer step is infinite or no number; the step was not made."""


class Student(nn.Module):
    """The student with its objective: a forward pass returns the loss, so logits never leave it.

    To be called within a run of the weights' shards.
    """

    def __init__(
        self,
        weights: Weights,
        temperature: float,
        chunk_tokens: int,
        rows: int,
        functions: Mapping[str, UserDivergence] | None = None,
    ) -> None:
        super().__init__()
        self.model = weights.model
        self.weights = weights
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.rows = rows  # ids that are compared
        self.functions = functions

    @property
    def head(self) -> Tensor:
        """The output projection of the ids that are compared, [rows, H]; within `Shards.with_head`."""
        return self.weights.head[: self.rows]

    @property
    def transform(self) -> LogitTransform:
        """How logits of these ids follow from head × hidden; within `Shards.with_head`."""
        return self.weights.transform.first(self.rows)

    def forward(
        self,
        batch: MicroBatch,
        scores: TeacherScores | None,
        reference: TeacherScores | None,
        losses: Table[Loss],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.weights.selected_states(batch.student)
        with_head = self.weights.sharding.run_with_head
        return with_head(self._projected_loss, hidden, batch, scores, reference, losses)

    def _projected_loss(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        scores: TeacherScores | None,
        reference: TeacherScores | None,
        losses: Table[Loss],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = Objective(losses, self.temperature, self.functions)
        return projected_loss(
            hidden,
            self.head,
            scores,
            self._with_sequence_statistics(batch, hidden.detach(), scores, objective),
            objective,
            self.chunk_tokens,
            reference,
            self.transform,
        )

    @torch.no_grad()
    def _with_sequence_statistics(
        self,
        batch: MicroBatch,
        hidden: Tensor,
        scores: TeacherScores | None,
        objective: Objective,
    ) -> Tokens:
        """The tokens with what takes whole sequences to know, where a term needs it."""
        tokens, losses = batch.tokens, objective.losses
        ratio = objective.needs_sequence_ratio and tokens.sampler_logprobs is not None
        if not ratio and not objective.needs_sequence_means:
            return tokens
        then = tokens.old_logprobs
        if then is None or objective.needs_sequence_means:
            now = self._logprobs(hidden, tokens.token)
        else:
            now = then
        if ratio:
            before = now if then is None else then
            tokens = evolve(tokens, ratio=sampler_ratio(losses, before, tokens, batch.rows))
        if objective.needs_sequence_means:
            teacher = scores and scored_logprobs(
                scores, tokens.token, self.temperature, self.chunk_tokens
            )
            means = sequence_means(losses, now, teacher, tokens, batch.rows)
            tokens = evolve(tokens, sequence_means=means)
        return tokens

    def _logprobs(self, hidden: Tensor, token: Tensor) -> Tensor:
        settings = self.temperature, self.chunk_tokens, self.transform
        return token_logprobs(hidden, self.head, token, *settings)

    @torch.no_grad()
    def token_statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each counted token, and entropy, at the sampling temperature.  -> twice [M] float32"""
        scores = self.weights.scores(batch.student, self.rows)
        return token_logprobs_and_entropy(
            scores, batch.tokens.token, self.temperature, self.chunk_tokens
        )


def train_step(world: TrainState, rollouts: RolloutBatch) -> StepResult:
    """Gradients of all micro-batches, one optimizer step, the teacher follows.

    The rollouts are `ready` (measuring.py), and so in `measure`.  Raises LossNotFinite before the step, on every rank.
    """
    losses = world.losses
    collated = _collate(world, rollouts, losses)
    sums: dict[str, Tensor] = {}
    seconds = {"teacher": 0.0, "update": 0.0}
    for batch in collated.micro_batches:
        started = time.perf_counter()
        reference = score_reference(world, batch)
        scores = score_teacher(world, batch, reference)
        scored = time.perf_counter()
        loss, stats = world.zero.forward(world.student_module, batch, scores, reference, losses)
        world.zero.backward(loss)
        _accumulate(sums, stats, batch)
        seconds["teacher"] += scored - started
        seconds["update"] += time.perf_counter() - scored
    started = time.perf_counter()
    metrics = average_metrics(sums, collated)
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise LossNotFinite
    lr = learning_rate(world.spec.optimizer, world.optimizer_steps, world.total_optimizer_steps)
    stepped = world.zero.step(lr)
    seconds["update"] += time.perf_counter() - started
    metrics |= {"grad_norm": stepped.grad_norm, "lr": lr} | _scheduled_values(world)
    if stepped.applied:
        world.optimizer_steps += 1
        metrics |= _update_teacher(world)
    return StepResult(metrics=metrics, seconds=seconds, applied=stepped.applied)


@torch.no_grad()
def evaluate_objective(world: TrainState, rollouts: RolloutBatch) -> dict[str, float]:
    """Every metric of the objective on these rollouts, without a step."""
    losses = world.losses
    collated = _collate(world, rollouts, losses)
    sums: dict[str, Tensor] = {}
    for batch in collated.micro_batches:
        reference = score_reference(world, batch)
        scores = score_teacher(world, batch, reference)
        run = world.student.sharding.run_forward
        _accumulate(sums, run(world.student_module, batch, scores, reference, losses)[1], batch)
    return average_metrics(sums, collated)


def _collate(world: TrainState, rollouts: RolloutBatch, losses: Table[Loss]) -> CollatedBatch:
    """This rank's micro-batches, as many as any rank has."""
    collated = collate(
        list(rollouts),
        losses,
        world.spec.training.micro_batch_tokens,
        collectives.all_reduce_sum,
        world.device,
        world.longest_pack,
    )
    teacher = any(map(needs_teacher, losses.values()))
    missing = collectives.all_reduce_max(len(collated.micro_batches)) - len(collated.micro_batches)
    more = [empty_micro_batch(losses, teacher=teacher, device=world.device)] * missing
    return evolve(collated, micro_batches=(*collated.micro_batches, *more))


def _scheduled_values(world: TrainState) -> dict[str, float]:
    """Numbers of the objective and of the teacher that move over the run, as they are now."""
    spec = world.spec
    found = (*schedules(spec.losses), *schedules(spec.teacher, ("teacher",)))
    return {
        "/".join(map(str, path)): scalar_at(value, world.optimizer_steps) for path, value in found
    }


def learning_rate(spec: OptimizerSpec, update: int, total: int) -> float:
    """The learning rate of optimizer step number `update` (from 0) of `total`."""
    if update < spec.warmup_steps:
        return spec.lr * (update + 1) / spec.warmup_steps
    share = min((update - spec.warmup_steps) / max(total - spec.warmup_steps, 1), 1.0)
    left = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    if spec.schedule == "constant":
        return spec.lr
    return spec.lr * (spec.final_share + (1 - spec.final_share) * left[spec.schedule])


def average_metrics(sums: Mapping[str, Tensor], collated: CollatedBatch) -> dict[str, float]:
    """Sums over tokens → means over each term's tokens; losses are weighted already.  One transfer from the device."""
    values = collectives.sum_scalars(sums)
    if not values:
        return {}
    metrics: dict[str, float] = {"loss": sum(v for k, v in values.items() if k.startswith("loss/"))}
    for key, value in values.items():
        name, _, figure = key.partition("/")
        if name == "loss":
            metrics[key] = value
        elif figure != "tokens":
            # Tokens of weight 0 have a place in the average, but no say in the figures.
            metrics[key] = value / max(values[f"{name}/tokens"], 1)
    metrics |= _route_shares(collated)
    tokens = sum(b.student.tokens for b in collated.micro_batches)
    held, padded = collectives.all_reduce_sum(
        torch.tensor([tokens, collated.padded_tokens])
    ).tolist()
    metrics["padding"] = 1 - held / max(padded, 1)
    for name, counts in collated.counts.items():
        metrics[f"{name}/tokens"] = counts.tokens
        metrics[f"{name}/empty_rows"] = 1 - counts.filled_rows / max(counts.rows, 1)
    return metrics


def _route_shares(collated: CollatedBatch) -> dict[str, float]:
    """Share of the rollouts on each branch of the route, where there is one."""
    branches = ("then", "otherwise")
    held = [[r.branch == branch for r in collated.order] for branch in branches]
    sums = collectives.all_reduce_sum(torch.tensor([sum(each) for each in held])).tolist()
    whole = sum(sums)
    if not whole:
        return {}
    return {f"route/{name}": n / whole for name, n in zip(branches, sums, strict=True)}


def _update_teacher(world: TrainState) -> dict[str, float]:
    teacher = world.teacher
    if teacher is None or not teacher.after_update(
        world.masters, world.optimizer_steps, world.scalar
    ):
        return {}
    return {"teacher_distance": teacher.distance}


def _accumulate(sums: dict[str, Tensor], stats: Mapping[str, Tensor], batch: MicroBatch) -> None:
    if not batch.rows:
        return
    for key, value in stats.items():
        sums[key] = value if key not in sums else sums[key] + value
