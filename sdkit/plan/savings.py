"""The memory of a rank, and where it exceeds the machine's the changes to a spec that lower it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import evolve

from sdkit.language.specs import Backend, ExperimentSpec, LoraSpec, ShapeSpec
from sdkit.plan.accelerators import Machine
from sdkit.plan.activations import micro_batch_tokens
from sdkit.plan.memory import MemoryEstimate, estimate_memory


def plan_memory(
    spec: ExperimentSpec, backend: Backend, machine: Machine, shape: ShapeSpec, other_shapes: Mapping[str, ShapeSpec]
) -> MemoryEstimate:
    """Returns one rank's memory; if it exceeds the machine's, with the changes that lower it, the best first.

    A change is written as on the command line.
    """
    estimate = estimate_memory(spec, backend, machine, shape, other_shapes)
    now = estimate.peak_gib
    if machine.memory_gib is None or now <= machine.memory_gib:
        return estimate
    peaks = [
        (text, estimate_memory(changed, backend, machine, shape, other_shapes).peak_gib)
        for text, changed in _changes(spec, machine)
    ]
    lower = sorted((change for change in peaks if change[1] < now), key=lambda change: change[1])
    return evolve(estimate, savings=tuple(lower))


def _changes(spec: ExperimentSpec, machine: Machine) -> Iterator[tuple[str, ExperimentSpec]]:
    """Yields settings as they are written on the command line, and the spec with each."""
    training, model, ranks = spec.training, spec.model, machine.ranks
    if not model.activation_checkpointing:
        yield "model.activation_checkpointing=true", evolve(spec, model=evolve(model, activation_checkpointing=True))
    if ranks > 1 and training.zero_stage < 3:
        stage = 2 if training.zero_stage < 2 else 3
        yield f"training.zero_stage={stage}", evolve(spec, training=evolve(training, zero_stage=stage))
    half = training.micro_batch_tokens // 2
    halved = evolve(spec, training=evolve(training, micro_batch_tokens=half))
    if half and micro_batch_tokens(halved, ranks) < micro_batch_tokens(spec, ranks):
        yield f"training.micro_batch_tokens={half}", halved
    if training.chunk_tokens > 64:
        yield "training.chunk_tokens=64", evolve(spec, training=evolve(training, chunk_tokens=64))
    if "optimizer" not in training.offload and training.zero_stage > 0 and not machine.on_cpu:
        offload = (*training.offload, "optimizer")
        yield f"training.offload=[{', '.join(offload)}]", evolve(spec, training=evolve(training, offload=offload))
    if model.lora is None:
        lora = LoraSpec(r=64, lora_alpha=128)
        yield "model.lora={r: 64, lora_alpha: 128}", evolve(spec, model=evolve(model, lora=lora))
    elif model.lora.quantize_base is None and training.zero_stage < 3:
        quantized = evolve(model.lora, quantize_base="nf4")
        yield "model.lora.quantize_base=nf4", evolve(spec, model=evolve(model, lora=quantized))
