"""The values of schedules at an optimizer step, and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from sdkit.language.schedules import at_step, half_cosine, scalar_at, schedules
from sdkit.language.specs import (
    Blend,
    ExperimentSpec,
    Loss,
    OptimizerSpec,
    RouteSpec,
    SampledBy,
    Table,
    TeacherWeights,
)


@frozen(eq=False, kw_only=True)
class StepSpecs:
    """The parts of a spec that schedules change, with every schedule replaced by its value at one optimizer step."""

    optimizer_steps: int  # applied before this one
    losses: Table[Loss]
    route: RouteSpec | None
    blend: Blend | None
    sampled_by: SampledBy
    next_teacher: TeacherWeights | None  # as of the next optimizer step: the teacher follows a step once it is applied
    lr: float
    scheduled: Mapping[str, float]  # the value of every schedule of the losses and the teacher, by its key path


def step_specs(spec: ExperimentSpec, optimizer_steps: int, total: int) -> StepSpecs:
    """Return the specs of the optimizer step after `optimizer_steps` steps, in a run of `total` steps."""
    scheduled = (*schedules(spec.losses), *schedules(spec.teacher, ("teacher",)))
    return StepSpecs(
        optimizer_steps=optimizer_steps,
        losses=at_step(spec.losses, optimizer_steps),
        route=spec.route,
        blend=at_step(spec.blend, optimizer_steps),
        sampled_by=at_step(spec.rollout.sampled_by, optimizer_steps),
        next_teacher=spec.teacher and at_step(spec.teacher.weights, optimizer_steps + 1),
        lr=learning_rate(spec.optimizer, optimizer_steps, total),
        scheduled={"/".join(map(str, path)): scalar_at(value, optimizer_steps) for path, value in scheduled},
    )


def learning_rate(spec: OptimizerSpec, update: int, total: int) -> float:
    """Return the learning rate of optimizer step `update` (from 0) of `total`."""
    if update < spec.warmup_steps:
        return spec.lr * (update + 1) / spec.warmup_steps
    if spec.lr_scheduler_type == "constant":
        return spec.lr
    progress = min((update - spec.warmup_steps) / max(total - spec.warmup_steps, 1), 1.0)
    decay = {"linear": 1 - progress, "cosine": half_cosine(progress, falling=True)}
    return spec.lr * (spec.final_share + (1 - spec.final_share) * decay[spec.lr_scheduler_type])
