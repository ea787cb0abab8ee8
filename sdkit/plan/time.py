"""Time of a step, estimated: spec × machine × shape → seconds.  Pure arithmetic on public figures of the device.

A forward pass takes 2 operations a parameter and token, and 2 · layers · hidden · length for the attention of a token in
a sequence of `length` under a causal mask.  A backward pass takes twice that, and half as much of it where the base
weights are frozen under adapters.  Decoding reads, for each new token of all rows together, the weights and the rows'
cached keys and values; its time is that of the reading or of the operations, whichever is longer.  Every sequence is
taken at its longest; rewards, communication and weight syncs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from attrs import frozen

from sdkit.language.required_statistics import needs_old_logprobs, required_statistics
from sdkit.language.specs import (
    Backend,
    DatasetSamples,
    ExperimentSpec,
    ExternalWeights,
    FrozenWeights,
    ProductBlend,
    ReplayBackend,
    ServedWeights,
    ShapeSpec,
    TeacherSamples,
    TrustRegionBlend,
    VllmBackend,
    VllmServerBackend,
    blend_base,
    external_teachers,
    needs_teacher,
    other_models,
    teachers_of,
)
from sdkit.plan.accelerators import ACCELERATORS, Accelerator, Machine
from sdkit.plan.memory import BYTES, GIB, engine_gib, needs_reference

COMPUTE_UTILIZATION = 0.4
"""Assumed share of the peak operations in passes over whole sequences."""
BANDWIDTH_UTILIZATION = 0.6
"""Assumed share of the peak memory bandwidth in decoding."""


@frozen(kw_only=True)
class Phase:
    """One part of a step."""

    label: str
    seconds: float


@frozen(kw_only=True)
class StepTime:
    """The phases of a step, or why they cannot be estimated, and what the figures rest on."""

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
    others: Mapping[str, ShapeSpec],
) -> StepTime | None:
    """The longest that one rollout batch should take; None where the machine's accelerator is not stated."""
    if machine.accelerator is None:
        return None
    device = ACCELERATORS[machine.accelerator]
    if missing := _missing_figure(spec, backend, shape, others):
        return StepTime(unknown_reason=missing)
    assert shape is not None
    rollouts = _rollouts_per_rank(spec, machine)
    prompt, view, new = _max_lengths(spec)
    training = _training_passes(spec) * _forward_operations(shape, rollouts, prompt + new)
    phases = [_rollout_phase(spec, backend, machine, device, shape)]
    if any(map(needs_teacher, spec.losses.values())):
        scoring = _scoring_operations(spec, shape, others, rollouts)
        what = f"teacher, {view} prompt and {new} new tokens"
        phases.append(Phase(label=what, seconds=_compute_seconds(device, scoring)))
    what = f"update, {prompt} prompt and {new} new tokens"
    phases.append(Phase(label=what, seconds=_compute_seconds(device, training)))
    return StepTime(phases=tuple(phases), assumptions=_assumptions(device))


def _assumptions(device: Accelerator) -> str:
    return (
        f"every sequence at its longest; {COMPUTE_UTILIZATION:.0%} of the {device.teraflops:g} TFLOP/s and {BANDWIDTH_UTILIZATION:.0%} of the "
        f"{device.terabytes:g} TB/s that an {device.title} has; no rewards, communication or weight syncs"
    )


def _missing_figure(
    spec: ExperimentSpec,
    backend: Backend,
    shape: ShapeSpec | None,
    others: Mapping[str, ShapeSpec],
) -> str | None:
    """What an estimate would have to guess."""
    sees = spec.teacher.sees if spec.teacher else None
    sampled = not isinstance(spec.rollout.sampled_by, DatasetSamples)
    if shape is None:
        return "the model's shape is not at hand; state it as model.shape"
    if any(weights.path not in others for _, weights in other_models(spec)):
        return "another model's shape is not at hand"
    if any(isinstance(weights, ServedWeights) for _, weights in teachers_of(spec)):
        return "how fast the teacher's server answers is not known"
    if spec.model.dtype != "bfloat16":
        return f"the figures are bfloat16's, and model.dtype is {spec.model.dtype}"
    if sampled and isinstance(backend, VllmServerBackend):
        return "how fast the rollout servers sample is not known"
    if sampled and not isinstance(backend, VllmBackend | ReplayBackend):
        return f"the figures are vLLM's, and the backend is {backend.kind}"
    if spec.rollout.max_prompt_tokens is None:
        return "how long prompts are is not known; state rollout.max_prompt_tokens"
    if sees and sees.max_prompt_tokens is None:
        return "how long teacher prompts are is not known; state teacher.sees.max_prompt_tokens"
    return None


def _max_lengths(spec: ExperimentSpec) -> tuple[int, int, int]:
    """The longest student prompt, teacher prompt and completion."""
    prompt = spec.rollout.max_prompt_tokens or 0
    sees = spec.teacher.sees if spec.teacher else None
    view = max(prompt, sees.max_prompt_tokens or 0) if sees else prompt
    return prompt, view, spec.rollout.max_new_tokens


def _rollouts_per_rank(spec: ExperimentSpec, machine: Machine) -> int:
    prompts = math.ceil(spec.training.prompts_per_step / machine.ranks)
    return prompts * spec.rollout.completions_per_prompt


# ── operations ────────────────────────────────────────────────────────────────────────────────


def _operations_per_token(shape: ShapeSpec, length: float) -> float:
    """Operations of the forward pass for a token in a sequence of `length`, averaged over its places."""
    return 2 * shape.parameters + 2 * shape.layers * shape.hidden * length


def _forward_operations(shape: ShapeSpec, sequences: int, length: int) -> float:
    """Operations of one forward pass over so many sequences."""
    return sequences * length * _operations_per_token(shape, length)


def _training_passes(spec: ExperimentSpec) -> int:
    """How many forward passes the student's update is worth, the reference's and the measuring pass included."""
    forward_and_backward = 2 if spec.model.lora else 3
    asked = any(measure.startswith("student") for measure in required_statistics(spec.losses))
    return (
        forward_and_backward
        + spec.model.activation_checkpointing
        + needs_reference(spec)
        + (asked or needs_old_logprobs(spec))
    )


def _scoring_operations(
    spec: ExperimentSpec, shape: ShapeSpec, others: Mapping[str, ShapeSpec], rollouts: int
) -> float:
    """Operations of the teachers' passes, the largest of them for all rows, and of what they are blended with."""
    prompt, view, new = _max_lengths(spec)
    held = [others[weights.path] for _, weights in external_teachers(spec)]
    largest = max(held, key=lambda other: other.parameters, default=shape)
    measuring = any(measure.startswith("teacher") for measure in required_statistics(spec.losses))
    asked = _forward_operations(largest, rollouts, view + new)
    base = blend_base(spec)
    if spec.teacher and isinstance(spec.teacher.blend, TrustRegionBlend):
        asked += _forward_operations(shape, rollouts, view + new)
    elif spec.teacher and isinstance(spec.teacher.blend, ProductBlend):
        asked += _forward_operations(shape, rollouts, prompt + new)
    elif isinstance(base, ExternalWeights):
        asked += _forward_operations(others[base.path], rollouts, prompt + new)
    # In the update the start model's pass is the reference's: see _training_passes.
    start = (
        _forward_operations(shape, rollouts, prompt + new)
        if isinstance(base, FrozenWeights)
        else 0.0
    )
    return asked + measuring * (asked + start)


def _compute_seconds(device: Accelerator, operations: float) -> float:
    return operations / (device.teraflops * 1e12 * COMPUTE_UTILIZATION)


# ── sampling ──────────────────────────────────────────────────────────────────────────────────


def _rollout_phase(
    spec: ExperimentSpec,
    backend: Backend,
    machine: Machine,
    device: Accelerator,
    shape: ShapeSpec,
) -> Phase:
    """Prompts once each, then completions in as many waves as the engine's rows and cache make necessary."""
    if not isinstance(backend, VllmBackend) or isinstance(spec.rollout.sampled_by, DatasetSamples):
        return Phase(label="rollout: nothing is sampled", seconds=0.0)
    prompt, view, new = _max_lengths(spec)
    by = spec.rollout.sampled_by
    if isinstance(by, TeacherSamples) and by.prompt == "teacher":
        prompt = view
    rollouts = _rollouts_per_rank(spec, machine)
    width = BYTES[backend.dtype or spec.model.dtype]
    cached = 2 * shape.layers * (shape.kv_width or shape.hidden) * width
    weights = shape.parameters * width
    room = (engine_gib(spec, backend, machine, shape) * GIB - weights) / (cached * (prompt + new))
    rows = max(1, min(rollouts, backend.max_rows, int(room)))
    middle = prompt + new / 2
    reading = (weights + rows * cached * middle) / (device.terabytes * 1e12 * BANDWIDTH_UTILIZATION)
    token = max(reading, _compute_seconds(device, rows * _operations_per_token(shape, 2 * middle)))
    prefill = _forward_operations(shape, rollouts // spec.rollout.completions_per_prompt, prompt)
    seconds = _compute_seconds(device, prefill) + math.ceil(rollouts / rows) * new * token
    what = f"rollout, {rollouts} completions of {new} tokens, {rows} at once"
    return Phase(label=what, seconds=seconds)
