"""Estimates what a run stores on disk.  Pure arithmetic."""

from __future__ import annotations

from attrs import frozen

from sdkit.language.specs import ExperimentSpec, ShapeSpec
from sdkit.plan.memory import (
    BYTES,
    FLOAT32,
    GIB,
    WEIGHT_SHARDING_STAGE,
    student_bytes,
    teacher_copies,
    trained_parameters,
    zero_stage,
)


@frozen(kw_only=True)
class DiskEstimate:
    """Sizes in GiB, over all ranks."""

    checkpoint: float
    model: float  # the trained model, with the adapter of a LoRA run


def estimate_disk(spec: ExperimentSpec, shape: ShapeSpec) -> DiskEstimate:
    """Returns the size of a checkpoint and of the trained model.

    A checkpoint holds the moments and, from stage 1 on, the masters; the model's weights, at stage 3 only those that are
    not trained; and the float32 average of each teacher that follows the student.
    """
    stage, width, trained = zero_stage(spec), BYTES[spec.model.dtype], trained_parameters(spec, shape)
    states = trained * (8 + (FLOAT32 if stage else 0))
    weights = (shape.parameters - (trained if stage == WEIGHT_SHARDING_STAGE else 0)) * width
    moving = sum(weights.follows_student for weights in teacher_copies(spec))
    if spec.model.lora:  # adapters, the teachers' as well, add to the model's parameters
        adapters = moving + (stage < WEIGHT_SHARDING_STAGE)
        weights = student_bytes(spec, shape) + adapters * trained * width
    averages = FLOAT32 * trained * moving
    adapter = trained * width if spec.model.lora else 0
    return DiskEstimate(
        checkpoint=(states + weights + averages) / GIB, model=(shape.parameters * width + adapter) / GIB
    )
