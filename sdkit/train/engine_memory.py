"""Whether training and vLLM's engine in this process fit the GPU together.

An engine starts before the first optimizer step, while the moments, gradients and activations of training do not exist,
so vLLM's own check passes and the first step runs out of memory.  This check adds what training is going to allocate.
"""

from __future__ import annotations

import torch
from attrs import evolve, frozen

from sdkit.distributed import collectives
from sdkit.distributed.zero import Zero
from sdkit.language.errors import OutOfMemory
from sdkit.language.model_shapes import shape_at
from sdkit.language.specs import TransformersBackend, VllmBackend
from sdkit.models.device import rank_device
from sdkit.plan.machine import machine_for, other_shapes
from sdkit.plan.plan import make_plan
from sdkit.train.setup import RunSetup

GIB = 2**30


@frozen(kw_only=True)
class GpuMemory:
    """The memory of a rank's GPU before the engine starts, GiB."""

    total: float
    usable: float  # what this process has and what is free
    resident: float  # what training holds between steps: weights, masters, and the moments that do not exist yet
    training: float  # the most that training is expected to use during a step, `resident` included


def check_engine_fits(setup: RunSetup, zero: Zero) -> None:
    """Raise OutOfMemory on every rank if a rank's GPU is too small for training and the engine.

    Call once the models are loaded and before the engine starts.  Without a GPU, or without an engine in this process,
    it does nothing.
    """
    spec, device = setup.plan.evaluation_backend, rank_device()
    if device.type != "cuda" or not isinstance(spec, VllmBackend):
        return
    faults = collectives.all_gather_object(shortage(spec, _measure(setup, zero, device)))
    if fault := next(filter(None, faults), None):
        message, hint = fault
        raise OutOfMemory(message, hint=hint, path=("rollout", "backend"))


def shortage(spec: VllmBackend, memory: GpuMemory) -> tuple[str, str] | None:
    """Returns what does not fit, and a hint; None if training and the engine fit together.

    An engine that sleeps during training shares the GPU only with what training holds between steps.
    """
    engine = spec.gpu_memory_utilization * memory.total
    training = memory.resident if spec.enable_sleep_mode else memory.training
    if max(training + engine, memory.training) <= memory.usable:
        return None
    message = (
        f"training needs {memory.training:.1f} GiB of the GPU's {memory.total:.1f}, vLLM {engine:.1f}"
        f"{' while it is awake' if spec.enable_sleep_mode else ''}, and {memory.usable:.1f} are usable"
    )
    share = int(100 * (memory.usable - training) / memory.total) / 100
    hints = [f"set rollout.backend.gpu_memory_utilization to {share:g}"] if share >= 0.05 else []
    if not spec.enable_sleep_mode:
        hints.append("set rollout.backend.enable_sleep_mode: true")
    if not hints or memory.training > memory.usable:
        hints = [
            "lower training.micro_batch_tokens, train LoRA adapters, or use more ranks and training.zero_stage: 3"
        ]
    return message, ", or ".join(hints)


def _measure(setup: RunSetup, zero: Zero, device: torch.device) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(device)
    resident = torch.cuda.memory_allocated(device) + zero.moments_to_come(device)
    return GpuMemory(
        total=total / GIB,
        usable=(free + torch.cuda.memory_reserved(device)) / GIB,
        resident=resident / GIB,
        training=max(resident / GIB, _planned_gib(setup)),
    )


def _planned_gib(setup: RunSetup) -> float:
    """The memory that the plan expects training alone to take; 0 if the model's shape is not known."""
    spec = setup.spec
    rollout = evolve(spec.rollout, backend=TransformersBackend())
    shape = shape_at(setup.model_folder, setup.base)
    machine = machine_for(spec, setup.plan.ranks)
    others = other_shapes(spec, setup.base)
    return make_plan(evolve(spec, rollout=rollout), machine, shape, other_shapes=others).peak_gib or 0.0
