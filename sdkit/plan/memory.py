"""Estimates the memory of a rank from spec, machine and model shape.  Pure arithmetic.

Weights, optimizer states and gradients are resident.  A micro-batch's forward and backward pass adds activations
(activations.py), the optimizer step adds copies of gradients, a pass over a teacher's rows by turn what a layer computes; of
these phases the largest counts.  Not included:
the CUDA context, NCCL's buffers, fragmentation, and what sampling with transformers takes (less than an update).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import frozen

from sdkit.language.specs import Backend, ExperimentSpec, FrozenWeights, OneTeacher, ShapeSpec, VllmBackend
from sdkit.plan.accelerators import Machine
from sdkit.plan.activations import (
    FLOAT32,
    attention_parameters,
    chunk_bytes,
    head_gradient_bytes,
    intermediate_size,
    micro_batch_tokens,
    recomputed_bytes,
    stored_bytes,
)
from sdkit.plan.teacher_rows import teacher_rows

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
NF4 = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)
"""Bytes of a value in 4 bits: each block of 64 has a scale in 8 bits, each 256 scales one in float32."""
WEIGHT_SHARDING_STAGE = 3
"""The ZeRO stage from which the weights are sharded."""
SUB_GROUP = 1_000_000_000
"""Values that stage 3 updates at a time (`sub_group_size`, DeepSpeed's default)."""
FLOAT64 = 8
MAX_LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered at most (`stage3_max_live_parameters`, DeepSpeed's default)."""


@frozen(kw_only=True)
class MemoryShare:
    """One item of the memory estimate."""

    label: str
    gib: float
    host: bool = False  # offloaded to CPU memory


@frozen(kw_only=True)
class MemoryEstimate:
    """The items of one rank's memory when it uses most, and the phase of a step in which it does."""

    shares: tuple[MemoryShare, ...]
    phase: str
    savings: tuple[tuple[str, float], ...] = ()
    """Where the peak exceeds the machine: changes that lower it, and the GiB that each leads to."""

    @property
    def peak_gib(self) -> float:
        """The sum of what is on the device."""
        return sum(share.gib for share in self.shares if not share.host)

    @property
    def host_gib(self) -> float:
        """The sum of what is offloaded to CPU memory."""
        return sum(share.gib for share in self.shares if share.host)


Items = tuple[tuple[str, float], ...]
"""Labels and bytes."""


@frozen(kw_only=True)
class _Run:
    """What the estimate of each item reads."""

    spec: ExperimentSpec
    stage: int
    ranks: int
    shape: ShapeSpec

    @property
    def width(self) -> int:
        return BYTES[self.spec.model.dtype]

    @property
    def trained(self) -> float:
        return trained_parameters(self.spec, self.shape)

    def sharded(self, parameters: float, from_stage: int) -> float:
        """Returns how many of these parameters a rank holds if they are sharded from a stage on."""
        return parameters / (self.ranks if self.stage >= from_stage else 1)


def zero_stage(spec: ExperimentSpec) -> int:
    """Returns the ZeRO stage that a run uses: 1 in place of 0 in bfloat16, where stage 0 has no float32 gradients."""
    stage: int = spec.training.zero_stage
    return 1 if stage == 0 and spec.model.dtype == "bfloat16" else stage


def estimate_memory(
    spec: ExperimentSpec, backend: Backend, machine: Machine, shape: ShapeSpec, other_shapes: Mapping[str, ShapeSpec]
) -> MemoryEstimate:
    """Returns one rank's memory.  `other_shapes` maps paths of other models to their shapes, where they are known."""
    run = _Run(spec=spec, stage=zero_stage(spec), ranks=machine.ranks, shape=shape)
    offload = () if machine.on_cpu else spec.training.offload
    resident = [
        (
            _student_label(spec),
            run.sharded(student_bytes(spec, shape), WEIGHT_SHARDING_STAGE),
            "parameters" in offload,
        ),
        *((label, size, "optimizer" in offload) for label, size in _optimizer_states(run)),
        *((label, size, "parameters" in offload) for label, size in _moving_teachers(run)),
    ]
    frozen = _frozen_models(run, other_shapes)
    if frozen and "frozen_models" in offload:
        resident.append(("largest offloaded model, during its use", max(size for _, size in frozen), False))
    resident += ((label, size, bool({"parameters", "frozen_models"} & {*offload})) for label, size in frozen)
    if isinstance(backend, VllmBackend):
        resident.append(("vLLM weights and cache", engine_gib(spec, backend, machine, shape) * GIB, False))
    phases = {
        "update": _update_items(run, on_cpu=machine.on_cpu),
        "optimizer step": _step_items(run, on_cpu=machine.on_cpu),
        "teacher's pass": _teacher_items(run),
    }
    phase = max(phases, key=lambda name: sum(size for _, size in phases[name]))
    items = [*resident, *((label, size, False) for label, size in phases[phase])]
    shares = tuple(MemoryShare(label=label, gib=size / GIB, host=host) for label, size, host in items if size)
    return MemoryEstimate(shares=shares, phase=phase)


def _student_label(spec: ExperimentSpec) -> str:
    quantized = spec.model.quantized
    return f"student weights, linear layers in {quantized}" if quantized else "student weights"


def student_bytes(spec: ExperimentSpec, shape: ShapeSpec) -> float:
    """Returns the bytes of the student's weights, without adapters and before sharding."""
    width = BYTES[spec.model.dtype]
    if spec.model.quantized is None:
        return shape.parameters * width
    feed_forward = (3 if shape.gated_mlp else 2) * shape.hidden_size * intermediate_size(shape)
    linear = shape.num_hidden_layers * (attention_parameters(shape) + feed_forward)
    return linear * NF4 + (shape.parameters - linear) * width


def _optimizer_states(run: _Run) -> Iterator[tuple[str, float]]:
    """Masters, moments and gradients: AdamW in float32, as DeepSpeed stores it at each stage.

    Masters and moments are sharded from stage 1 on, gradients from stage 2 on.  In float32 the weights are the masters
    at stages 0 and 3.  To add up the gradients of micro-batches, stage 1 in bfloat16 stores them in bfloat16 and in
    float32, and stage 2 in float32 stores the sum and those of one micro-batch.
    """
    states = 8 + (0 if run.width == FLOAT32 and run.stage in (0, 3) else FLOAT32)
    yield "masters and moments", run.sharded(run.trained, 1) * states
    second = run.width if (run.stage, run.width) in ((1, 2), (2, 4)) else 0
    yield "gradients", run.sharded(run.trained, 2) * (FLOAT32 + second)


def _moving_teachers(run: _Run) -> Iterator[tuple[str, float]]:
    """Teachers that follow the student: a copy of its weights, or of its adapter, and a float32 average.

    The average of float32 weights is the copy itself.  Other averages are sharded as the masters are.
    """
    spec = run.spec
    copied = run.trained if spec.model.lora else run.shape.parameters
    shadow = 0 if run.width == FLOAT32 else run.sharded(run.trained, 1) * FLOAT32
    for weights in teacher_copies(spec):
        if weights.follows_student:
            label = "teacher adapter" if spec.model.lora else "teacher weights"
            yield label, run.sharded(copied, WEIGHT_SHARDING_STAGE) * run.width + shadow


def _frozen_models(run: _Run, other_shapes: Mapping[str, ShapeSpec]) -> list[tuple[str, float]]:
    """Frozen copies of the student, and other models; stage 3 shards all of them."""
    spec, models = run.spec, []
    student_size = run.sharded(run.shape.parameters, WEIGHT_SHARDING_STAGE) * run.width
    models += [("teacher weights", student_size) for weights in teacher_copies(spec) if not weights.follows_student]
    for weights in dict.fromkeys(weights for _, weights in spec.other_models()):
        if other_shape := other_shapes.get(weights.path):
            size = run.sharded(other_shape.parameters, WEIGHT_SHARDING_STAGE) * BYTES[weights.dtype]
            models.append((f"model {weights.path}", size))
    if spec.needs_reference and not spec.model.lora and not has_frozen_teacher(spec):
        models.append(("reference weights", student_size))
    return models


def _update_items(run: _Run, *, on_cpu: bool) -> Items:
    """What a micro-batch adds: activations, and the most of what comes one after the other on top of them.

    First the objective's chunk and the output projection's gradient; then that gradient scaled; then each layer again.
    """
    spec, shape, width = run.spec, run.shape, run.width
    tokens = micro_batch_tokens(spec, run.ranks)
    in_loss, in_backward = head_gradient_bytes(spec, shape, width)
    on_top: list[Items] = [
        (
            ("projection chunk (student, teacher, gradient)", chunk_bytes(spec, shape, width, on_cpu=on_cpu)),
            ("gradient of the output projection", in_loss),
        ),
        (("gradient of the output projection, and its scaled copy", in_backward),),
        (
            ("one layer, recomputed", recomputed_bytes(spec, shape, width, tokens, on_cpu=on_cpu)),
            ("one weight, dequantized", _dequantized_bytes(run)),
        ),
    ]
    return (
        (f"activations of a micro-batch of {tokens} tokens", stored_bytes(spec, shape, width, tokens, on_cpu=on_cpu)),
        *max(on_top, key=lambda items: sum(size for _, size in items)),
        *_communication(run, on_cpu=on_cpu),
        *_gathered(run),
    )


def _teacher_items(run: _Run) -> Items:
    """What a pass over the rows of a teacher whose context differs by turn adds: the values of one layer, without gradient.

    Those are the states in float32 and twice in the model's dtype, and three values of the feed-forward part.
    """
    views, training = teacher_rows(run.spec), run.spec.training
    if views is None:
        return ()
    rollouts = training.prompts_per_step // run.ranks * run.spec.rollout.completions_per_prompt
    tokens = max(min(training.micro_batch_tokens, rollouts * views.padded), views.longest)
    if run.stage == WEIGHT_SHARDING_STAGE:  # a trajectory's rows are not split
        tokens = max(tokens, views.padded)
    value = (FLOAT32 + 2 * run.width) * run.shape.hidden_size + 3 * run.width * intermediate_size(run.shape)
    return ((f"one layer of a pass over {tokens} tokens of the teacher's rows", tokens * value),)


def _dequantized_bytes(run: _Run) -> float:
    """The largest of the quantized weights in the model's dtype, as a forward or backward pass multiplies by it."""
    return run.width * run.shape.hidden_size * intermediate_size(run.shape) if run.spec.model.quantized else 0.0


def _communication(run: _Run, *, on_cpu: bool) -> Iterator[tuple[str, float]]:
    """DeepSpeed's buffers in the backward pass.

    Stages 1 (in float32) to 3 reduce gradients in buckets, copied to be sorted by rank and to have `reduce_dtype`.  Stage
    1 in bfloat16 reduces its float32 gradients at once, copied if that is not `reduce_dtype`.  On a CPU the part of a
    bucket that is never written takes no memory.
    """
    training = run.spec.training
    reduced = BYTES[training.reduce_dtype]
    if run.stage == 1 and run.width < FLOAT32:
        yield "gradients being reduced", run.trained * reduced if reduced < FLOAT32 else 0.0
    elif run.stage:
        size = training.reduce_bucket_size
        filled = min(size, run.trained)
        stored = reduced if run.stage == WEIGHT_SHARDING_STAGE else run.width
        copies = (run.width if run.ranks > 1 else 0) + (reduced if reduced != stored else 0)
        yield "gradients being reduced", (filled if on_cpu else size) * stored + filled * copies


def _gathered(run: _Run) -> Iterator[tuple[str, float]]:
    """What stage 3 gathers: parameters of the model that runs, and the output projection of each model that has scored."""
    if run.stage == WEIGHT_SHARDING_STAGE:
        models = len([*_moving_teachers(run), *_frozen_models(run, {})]) if run.spec.model.lora is None else 0
        heads = models * run.shape.vocab_size * run.shape.hidden_size
        yield "gathered parameters", (min(run.shape.parameters, MAX_LIVE) + heads) * run.width


def _step_items(run: _Run, *, on_cpu: bool) -> Items:
    """What the optimizer step adds: the largest gradient in float64, for its norm; then a flat copy of the gradients."""
    shape, own = run.shape, run.sharded(run.trained, 1)
    copy = own if (run.stage, run.width) in ((1, 4), (2, 4)) else min(own, SUB_GROUP) if run.stage == 3 else 0
    largest = min(max(shape.vocab_size, intermediate_size(shape)) * shape.hidden_size, own)
    norm = FLOAT64 * largest if run.stage > 1 or (run.width == FLOAT32 and run.stage == 1) else 0
    # gloo gathers the new weights into a buffer; NCCL gathers them in place.
    gathered = run.trained * run.width if on_cpu and run.stage == 1 and run.width < FLOAT32 else 0
    return (("copies in the optimizer step", max(copy * FLOAT32, norm, gathered)),)


def teacher_copies(spec: ExperimentSpec) -> list[OneTeacher]:
    """Returns the teachers that store weights of the student's shape; routes with equal weights share one.

    Beside LoRA only teachers that follow the student do: their adapters.
    """
    distinct = dict.fromkeys(weights for _, weights in spec.teachers())
    stored = [w for w in distinct if w.is_stored and not w.is_other_model]
    return [w for w in stored if w.follows_student] if spec.model.lora else stored


def has_frozen_teacher(spec: ExperimentSpec) -> bool:
    """Whether the start model is a teacher; it then serves as the reference too."""
    return any(isinstance(weights, FrozenWeights) for _, weights in spec.teachers())


def trained_parameters(spec: ExperimentSpec, shape: ShapeSpec) -> float:
    """Returns the number of trained parameters: all, or the two LoRA factors of a layer's adapted projections."""
    lora = spec.model.lora
    if lora is None:
        return shape.parameters
    hidden, inner = shape.hidden_size, intermediate_size(shape)
    queries, keys = shape.q_width or hidden, shape.kv_width or hidden
    sizes = {"q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": queries + hidden}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    if not shape.gated_mlp:
        del sizes["gate_proj"]
    targets = sizes if lora.target_modules == "all-linear" else lora.target_modules
    factors = sum(sizes.get(name, hidden + hidden) for name in targets)
    return min(shape.parameters, shape.num_hidden_layers * lora.r * factors)


def engine_gib(spec: ExperimentSpec, backend: VllmBackend, machine: Machine, shape: ShapeSpec) -> float:
    """Returns vLLM's memory in GiB: its share of the accelerator's memory if known, else its weights and `kv_cache_gib`."""
    if machine.accelerator and machine.memory_gib:
        return backend.gpu_memory_utilization * machine.memory_gib
    return engine_weights_gib(spec, backend, shape) + backend.kv_cache_gib


def engine_weights_gib(spec: ExperimentSpec, backend: VllmBackend, shape: ShapeSpec) -> float:
    """Returns the size of one rank's share of vLLM's weights in GiB."""
    return shape.parameters * BYTES[backend.dtype or spec.model.dtype] / backend.tensor_parallel_size / GIB
