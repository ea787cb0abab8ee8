"""Estimates the time of a step from spec, machine and model shape.  Pure arithmetic on the device's figures.

A forward and backward pass takes `training_factor` forward passes.  The update computes the prompt of a group once if
`training.share_prompts` is set; teachers are assumed to have another prompt for each completion.  Each decoding step
reads the weights once, and the cached keys and values of all rows; it takes as long as the reads or the operations,
whichever is slower.  Every sequence is assumed to have its
maximum length.  Rewards, communication and weight syncs are not included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from attrs import frozen

from sdkit.language.specs import (
    Backend,
    DatasetSamples,
    ExperimentSpec,
    ExternalWeights,
    FrozenWeights,
    ReplayBackend,
    ShapeSpec,
    VllmBackend,
    VllmServerBackend,
    required_statistics,
)
from sdkit.plan.accelerators import Accelerator, Machine
from sdkit.plan.memory import BYTES, GIB, engine_gib
from sdkit.plan.operations import forward_operations, shared_prompt_operations, training_factor
from sdkit.plan.teacher_rows import teacher_rows


@frozen(kw_only=True)
class Phase:
    """One phase of a step."""

    label: str
    seconds: float


@frozen(kw_only=True)
class StepTime:
    """The phases of a step and the assumptions, or why they cannot be estimated."""

    phases: tuple[Phase, ...] = ()
    unknown_reason: str | None = None
    assumptions: str = ""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


def estimate_step_time(
    spec: ExperimentSpec,
    backend: Backend,
    machine: Machine,
    shape: ShapeSpec | None,
    other_shapes: Mapping[str, ShapeSpec],
) -> StepTime | None:
    """Returns an upper estimate of the time of one rollout batch; None if the spec states no accelerator."""
    if machine.accelerator is None:
        return None
    device = machine.accelerator
    if missing := _missing_figure(spec, backend, device, shape, other_shapes):
        return StepTime(unknown_reason=missing)
    assert shape is not None
    rollouts = _rollouts_per_rank(spec, machine)
    prompt, teacher_prompt, new = _max_lengths(spec)
    prompts = _prompts_per_rank(spec, machine) if spec.training.share_prompts else rollouts
    training = _training_passes(spec) * shared_prompt_operations(shape, prompts, prompt, rollouts, new)
    phases = [_rollout_phase(spec, backend, machine, device, shape)]
    if any(term.needs_teacher for term in spec.losses.values()):
        scoring = _scoring_operations(spec, shape, other_shapes, rollouts)
        label = f"teacher, {teacher_prompt} prompt and {new} new tokens"
        phases.append(Phase(label=label, seconds=_compute_seconds(device, scoring)))
    label = f"update, {prompt} prompt and {new} new tokens"
    phases.append(Phase(label=label, seconds=_compute_seconds(device, training)))
    return StepTime(phases=tuple(phases), assumptions=_assumptions(device))


def _assumptions(device: Accelerator) -> str:
    return (
        f"every sequence at its longest; {device.compute_utilization:.0%} of the {device.teraflops:g} TFLOP/s and {device.bandwidth_utilization:.0%} of the "
        f"{device.terabytes:g} TB/s that an {device.title} has; no rewards, communication or weight syncs"
    )


def _missing_figure(
    spec: ExperimentSpec,
    backend: Backend,
    device: Accelerator,
    shape: ShapeSpec | None,
    other_shapes: Mapping[str, ShapeSpec],
) -> str | None:
    """The first figure that the estimate needs and does not have; None if it has all."""
    sees = spec.sees
    sampled = not isinstance(spec.rollout.sampled_by, DatasetSamples)
    if shape is None:
        return "the model's shape is not at hand; state it as model.shape"
    if any(weights.path not in other_shapes for _, weights in spec.other_models()):
        return "another model's shape is not at hand"
    if any(spec.served_teachers()):
        return "how fast the teacher's server answers is not known"
    if spec.writer:
        return "how fast the writer's server answers is not known"
    if spec.model.dtype != device.dtype:
        return f"the figures are {device.dtype}'s, and model.dtype is {spec.model.dtype}"
    if sampled and isinstance(backend, VllmServerBackend):
        return "how fast the rollout servers sample is not known"
    if sampled and not isinstance(backend, VllmBackend | ReplayBackend):
        return f"the figures are vLLM's, and the backend is {backend.kind}"
    if sampled and isinstance(backend, VllmBackend) and (backend.tensor_parallel_size > 1 or not backend.is_exact):
        return "how fast quantized or shared engines sample is not known"
    if spec.rollout.max_prompt_tokens is None:
        return "how long prompts are is not known; state rollout.max_prompt_tokens"
    if sees and sees.max_prompt_tokens is None:
        return "how long teacher prompts are is not known; state teacher.sees.max_prompt_tokens"
    return None


def _max_lengths(spec: ExperimentSpec) -> tuple[int, int, int]:
    """The maximum lengths of student prompt, teacher prompt and completion."""
    prompt = spec.rollout.max_prompt_tokens or 0
    sees = spec.sees
    teacher_prompt = max(prompt, sees.max_prompt_tokens or 0) if sees else prompt
    return prompt, teacher_prompt, spec.longest_completion()


def _prompts_per_rank(spec: ExperimentSpec, machine: Machine) -> int:
    return math.ceil(spec.training.prompts_per_step / machine.ranks)


def _rollouts_per_rank(spec: ExperimentSpec, machine: Machine) -> int:
    return _prompts_per_rank(spec, machine) * spec.rollout.completions_per_prompt


def _training_passes(spec: ExperimentSpec) -> int:
    """The cost of the student's update in forward passes, with the reference and the statistics pass."""
    statistics = any(name.startswith("student") for name in required_statistics(spec.losses))
    return (
        training_factor(adapters=spec.model.lora is not None)
        + spec.model.activation_checkpointing
        + spec.needs_reference
        + (statistics or spec.needs_old_logprobs)
    )


def _scoring_operations(
    spec: ExperimentSpec, shape: ShapeSpec, other_shapes: Mapping[str, ShapeSpec], rollouts: int
) -> float:
    """Operations of the teachers' passes, assuming the largest teacher for all rows, and of their blend partners."""
    prompt, teacher_prompt, new = _max_lengths(spec)
    external = [other_shapes[weights.path] for _, weights in spec.external_teachers()]
    largest = max(external, key=lambda model: model.parameters, default=shape)
    statistics = any(name.startswith("teacher") for name in required_statistics(spec.losses))
    scores = _scored_rows(spec, largest, rollouts, teacher_prompt, new)
    blend, start = spec.blend, 0.0
    if blend:
        partner = other_shapes[blend.base.path] if isinstance(blend.base, ExternalWeights) else shape
        if blend.partner_prompt == "teacher":
            operations = _scored_rows(spec, partner, rollouts, teacher_prompt, new)
        else:
            operations = shared_prompt_operations(partner, rollouts, prompt, rollouts, new)
        if isinstance(blend.base, FrozenWeights):
            start = operations  # in the update, this pass is counted as the reference's: see _training_passes
        else:
            scores += operations
    return scores + statistics * (scores + start)


def _scored_rows(spec: ExperimentSpec, shape: ShapeSpec, rollouts: int, prompt: int, new: int) -> float:
    """Operations of one pass over the teacher's rows: one a rollout, or one for each of its turns, which are equally long."""
    views = teacher_rows(spec)
    if views is None:
        return shared_prompt_operations(shape, rollouts, prompt, rollouts, new)
    turn = new / views.rows
    return sum(
        shared_prompt_operations(shape, rollouts, prompt + turn * number, rollouts, turn)
        for number in range(views.rows)
    )


def _compute_seconds(device: Accelerator, operations: float) -> float:
    return operations / (device.teraflops * 1e12 * device.compute_utilization)


def _rollout_phase(
    spec: ExperimentSpec, backend: Backend, machine: Machine, device: Accelerator, shape: ShapeSpec
) -> Phase:
    """Prefill of each prompt once, then decoding in as many waves as the engine's row and cache limits require."""
    if not isinstance(backend, VllmBackend) or isinstance(spec.rollout.sampled_by, DatasetSamples):
        return Phase(label="rollout: nothing is sampled", seconds=0.0)
    prompt, teacher_prompt, new = _max_lengths(spec)
    if spec.rollout.sampled_by.uses_teacher_prompt:
        prompt = teacher_prompt
    rollouts = _rollouts_per_rank(spec, machine)
    width = BYTES[backend.dtype or spec.model.dtype]
    cached = 2 * shape.num_hidden_layers * (shape.kv_width or shape.hidden_size) * width
    weights = shape.parameters * width
    max_cached_rows = (engine_gib(spec, backend, machine, shape) * GIB - weights) / (cached * (prompt + new))
    rows = max(1, min(rollouts, backend.max_num_seqs, int(max_cached_rows)))
    middle = prompt + new / 2
    reading = (weights + rows * cached * middle) / (device.terabytes * 1e12 * device.bandwidth_utilization)
    token = max(reading, _compute_seconds(device, forward_operations(shape, rows, 2 * middle, rows)))
    prompts = _prompts_per_rank(spec, machine)
    prefill = forward_operations(shape, prompts * prompt, prompt, prompts)
    seconds = _compute_seconds(device, prefill) + math.ceil(rollouts / rows) * new * token
    label = f"rollout, {rollouts} completions of {new} tokens, {rows} at once"
    return Phase(label=label, seconds=seconds)
