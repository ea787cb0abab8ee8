"""Estimates the memory of a rank from spec, machine and model shape.  Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from sdkit.language.specs import Backend, ExperimentSpec, FrozenWeights, OneTeacher, ShapeSpec, VllmBackend
from sdkit.plan.accelerators import Machine

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
WEIGHT_SHARDING_STAGE = 3
"""The ZeRO stage from which the weights are sharded."""


@frozen(kw_only=True)
class MemoryShare:
    """One item of the memory estimate."""

    label: str
    gib: float


def teacher_copies(spec: ExperimentSpec) -> list[OneTeacher]:
    """Returns the teachers that need their own copy of the model; routes with equal weights share one."""
    if spec.model.lora:
        return []
    distinct = dict.fromkeys(weights for _, weights in spec.teachers())
    return [w for w in distinct if w.is_stored and not w.is_other_model]


def has_frozen_teacher(spec: ExperimentSpec) -> bool:
    """Whether the start model is a teacher; it then serves as the reference too."""
    return any(isinstance(weights, FrozenWeights) for _, weights in spec.teachers())


def estimate_memory(
    spec: ExperimentSpec,
    backend: Backend,
    stage: int,
    machine: Machine,
    shape: ShapeSpec,
    other_shapes: Mapping[str, ShapeSpec],
) -> tuple[MemoryShare, ...]:
    """Returns the items of one rank's memory in GiB, without offload.

    Master weights (4 bytes per trained parameter) and the two moments (8 bytes) are sharded from ZeRO stage 1 on,
    float32 gradients (4 bytes) from stage 2, model weights from stage 3.
    """
    width = BYTES[spec.model.dtype]
    local = shape.parameters / (machine.ranks if stage >= WEIGHT_SHARDING_STAGE else 1)
    trained = trained_parameters(spec, shape)
    moments = (8 if stage == 0 else 12) / (machine.ranks if stage >= 1 else 1)
    gradients = 4 / (machine.ranks if stage >= 2 else 1)
    shadow = 0 if width == 4 else 4  # a float32 average is the teacher's weights themselves
    items = [
        ("student weights", local * width),
        ("masters and moments", trained * moments),
        ("gradients", trained * gradients),
        *(("teacher weights", local * (width + shadow * weights.follows_student)) for weights in teacher_copies(spec)),
    ]
    for weights in dict.fromkeys(weights for _, weights in spec.other_models()):
        if other_shape := other_shapes.get(weights.path):
            items.append((f"model {weights.path}", other_shape.parameters * BYTES[weights.dtype]))
    if spec.needs_reference and not spec.model.lora and not has_frozen_teacher(spec):
        items.append(("reference weights", local * width))
    if isinstance(backend, VllmBackend):
        items.append(("vLLM weights and cache", engine_gib(spec, backend, machine, shape) * GIB))
    stored = 2 if spec.model.activation_checkpointing else 34  # values per token, layer and channel
    activations = spec.training.micro_batch_tokens * shape.hidden_size * shape.num_hidden_layers * stored
    items.append(("activations of a micro-batch", activations * width / 2))
    buffers = 8 if spec.blend else 6
    logits = spec.training.chunk_tokens * shape.vocab_size * 4
    items.append(("projection chunk (student, teacher, gradient)", buffers * logits))
    return tuple(MemoryShare(label=label, gib=size / GIB) for label, size in items)


def trained_parameters(spec: ExperimentSpec, shape: ShapeSpec) -> int:
    """Returns the number of trained parameters: all, or two LoRA factors for each of a layer's seven projections."""
    lora = spec.model.lora
    if lora is None:
        return shape.parameters
    return min(shape.parameters, 2 * 7 * shape.num_hidden_layers * lora.r * 2 * shape.hidden_size)


def engine_gib(spec: ExperimentSpec, backend: VllmBackend, machine: Machine, shape: ShapeSpec) -> float:
    """Returns vLLM's memory in GiB: its share of the accelerator's memory if known, else its weights and `kv_cache_gib`."""
    if machine.accelerator and machine.memory_gib:
        return backend.gpu_memory_utilization * machine.memory_gib
    weights = shape.parameters * BYTES[backend.dtype or spec.model.dtype] / GIB
    return weights / backend.tensor_parallel_size + backend.kv_cache_gib
