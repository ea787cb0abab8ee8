"""Memory of a rank, estimated: spec × machine × shape → shares.  Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from sdkit.language.specs import (
    Backend,
    CopyWeights,
    EmaWeights,
    ExperimentSpec,
    ExternalWeights,
    FrozenWeights,
    OneTeacher,
    ReferenceKl,
    ServedWeights,
    ShapeSpec,
    StudentWeights,
    VllmBackend,
    blend_base,
    other_models,
    teachers_of,
)
from sdkit.plan.accelerators import Machine

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
WEIGHT_SHARDING_STAGE = 3
"""From this ZeRO stage on each rank holds a part of the weights alone."""


@frozen(kw_only=True)
class MemoryShare:
    """One part of the memory estimate."""

    label: str
    gib: float


def teacher_copies(spec: ExperimentSpec) -> list[OneTeacher]:
    """The teachers that need a copy of the model beside the student; routes of equal weights share one."""
    if spec.model.lora:
        return []
    held = dict.fromkeys(weights for _, weights in teachers_of(spec))
    return [w for w in held if not isinstance(w, StudentWeights | ExternalWeights | ServedWeights)]


def has_reference_term(spec: ExperimentSpec) -> bool:
    """Whether a term holds the student near the frozen start model."""
    return any(isinstance(term, ReferenceKl) for term in spec.losses.values())


def needs_reference(spec: ExperimentSpec) -> bool:
    """Whether the frozen start model is asked under the student's prompt: by a term, or to be blended with the teacher."""
    return has_reference_term(spec) or isinstance(blend_base(spec), FrozenWeights)


def has_frozen_teacher(spec: ExperimentSpec) -> bool:
    """Whether the start model teaches, which then is the reference too."""
    return any(isinstance(weights, FrozenWeights) for _, weights in teachers_of(spec))


def estimate_memory(
    spec: ExperimentSpec,
    backend: Backend,
    stage: int,
    machine: Machine,
    shape: ShapeSpec,
    others: Mapping[str, ShapeSpec],
) -> tuple[MemoryShare, ...]:
    """Bytes on one rank without offload.

    Masters (4 bytes a trained parameter) and the two moments (8) are dealt out among the ranks from ZeRO stage 1 on,
    float32 gradients (4) from stage 2, weights from stage 3.
    """
    own = BYTES[spec.model.dtype]
    held = shape.parameters / (machine.ranks if stage >= WEIGHT_SHARDING_STAGE else 1)
    trained = trained_parameters(spec, shape)
    moments = (8 if stage == 0 else 12) / (machine.ranks if stage >= 1 else 1)
    gradients = 4 / (machine.ranks if stage >= 2 else 1)
    shares = [
        MemoryShare(label="student weights", gib=held * own / GIB),
        MemoryShare(label="masters and moments", gib=trained * moments / GIB),
        MemoryShare(label="gradients", gib=trained * gradients / GIB),
    ]
    for weights in teacher_copies(spec):
        moving = isinstance(weights, EmaWeights | CopyWeights)
        shares.append(MemoryShare(label="teacher weights", gib=held * (own + 4 * moving) / GIB))
    for weights in dict.fromkeys(weights for _, weights in other_models(spec)):
        if other := others.get(weights.path):
            size = other.parameters * BYTES[weights.dtype] / GIB
            shares.append(MemoryShare(label=f"model {weights.path}", gib=size))
    if needs_reference(spec) and not spec.model.lora and not has_frozen_teacher(spec):
        shares.append(MemoryShare(label="reference weights", gib=held * own / GIB))
    if isinstance(backend, VllmBackend):
        size = engine_gib(spec, backend, machine, shape)
        shares.append(MemoryShare(label="vLLM weights and cache", gib=size))
    return (*shares, *_activation_shares(spec, shape))


def trained_parameters(spec: ExperimentSpec, shape: ShapeSpec) -> int:
    """All, or those of the adapters: two factors on each of the seven projections of a layer."""
    lora = spec.model.lora
    if lora is None:
        return shape.parameters
    return min(shape.parameters, 2 * 7 * shape.layers * lora.rank * 2 * shape.hidden)


def engine_gib(
    spec: ExperimentSpec, backend: VllmBackend, machine: Machine, shape: ShapeSpec
) -> float:
    """What vLLM takes: its share of an accelerator's memory, else its weights and the cache that was asked for."""
    if machine.accelerator and machine.memory_gib:
        return backend.gpu_share * machine.memory_gib
    weights = shape.parameters * BYTES[backend.dtype or spec.model.dtype] / GIB
    return weights + backend.cache_gib


def _activation_shares(spec: ExperimentSpec, shape: ShapeSpec) -> tuple[MemoryShare, ...]:
    """What a micro-batch needs while it is in the model."""
    kept = 2 if spec.model.activation_checkpointing else 34
    activations = spec.training.micro_batch_tokens * shape.hidden * shape.layers * kept
    chunk = spec.training.chunk_tokens * shape.vocabulary * 4
    sides = 8 if spec.teacher and spec.teacher.blend else 6
    return (
        MemoryShare(
            label="activations of a micro-batch",
            gib=activations * BYTES[spec.model.dtype] / 2 / GIB,
        ),
        MemoryShare(label="projection chunk (student, teacher, gradient)", gib=sides * chunk / GIB),
    )
