"""Derives the plan of a run, all derived numbers and roles, from its spec and machine.  Pure: no files, devices or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import assert_never

from attrs import field, frozen

from sdkit.language.errors import UnreadableInput, counted
from sdkit.language.specs import (
    HOTTEST_VLLM,
    AutoBackend,
    DatasetSamples,
    Distillation,
    ExperimentSpec,
    ExternalWeights,
    MethodSpec,
    ReplayBackend,
    ServedWeights,
    ShapeSpec,
    Statistic,
    TransformersBackend,
    VllmBackend,
    VllmEngine,
    VllmServerBackend,
    indivisible,
    required_statistics,
)
from sdkit.plan.accelerators import Machine
from sdkit.plan.disk import DiskEstimate, estimate_disk
from sdkit.plan.memory import (
    BYTES,
    GIB,
    MemoryEstimate,
    engine_gib,
    engine_weights_gib,
    has_frozen_teacher,
    zero_stage,
)
from sdkit.plan.processes import describe_processes
from sdkit.plan.savings import plan_memory
from sdkit.plan.teacher_rows import TeacherRows, teacher_rows
from sdkit.plan.time import StepTime, estimate_step_time

ChosenBackend = TransformersBackend | VllmBackend | VllmServerBackend
VLLM_DEFAULT_MAX_LOGPROBS = 20  # vLLM's default of --max-logprobs


@frozen(kw_only=True)
class Plan:
    """Everything derived from a spec.  `sdkit plan` prints it, `sdkit train` runs it."""

    backend: ChosenBackend | ReplayBackend
    evaluation_backend: ChosenBackend
    backend_reason: str
    zero_stage: int
    ranks: int
    prompts_per_rank: int
    rollouts_per_step: int
    updates_per_step: int
    rows: int | None  # training rows, if known
    steps: int | None  # rollout batches; None for epochs until the data is read
    oldest_rollout: int  # optimizer steps between sampling and the last update on a batch
    needs_old_logprobs: bool
    statistics: tuple[str, ...]  # token statistics and what needs them; empty if no pass is made
    objective: tuple[str, ...]
    roles: tuple[str, ...]
    weight_sync: str
    processes: tuple[str, ...]
    disk: DiskEstimate | None  # None if the model's shape is not known
    memory: MemoryEstimate | None  # None if the model's shape is not known
    memory_gib: float | None  # of the machine, per rank
    step_time: StepTime | None  # None if the spec states no accelerator
    derived: tuple[str, ...] = field(factory=tuple)

    @property
    def total_updates(self) -> int | None:
        """Optimizer steps of the run."""
        return None if self.steps is None else self.steps * self.updates_per_step

    @property
    def peak_gib(self) -> float | None:
        """The most memory that a rank uses; None if the model's shape is not known."""
        return self.memory.peak_gib if self.memory else None


@frozen(kw_only=True)
class MethodPlan:
    """The parts of a plan that depend only on the method page."""

    objective: tuple[str, ...]
    roles: tuple[str, ...]
    statistics: tuple[str, ...]


def plan_method(spec: MethodSpec) -> MethodPlan:
    """Returns the plan of a method page."""
    roles = [f"teacher: {spec.teacher.describe()}"] if spec.teacher else []
    return MethodPlan(
        objective=_objective(spec),
        roles=(*roles, f"sampler: {spec.rollout.describe()}"),
        statistics=_statistic_lines(required_statistics(spec.losses)),
    )


def make_plan(
    spec: ExperimentSpec,
    machine: Machine,
    shape: ShapeSpec | None,
    rows: int | None = None,
    other_shapes: Mapping[str, ShapeSpec] | None = None,
) -> Plan:
    """Returns the plan of a run.

    `rows` is the number of training rows, if known; epochs need it.  `other_shapes` maps the path of each model besides
    the student's to its shape, if known.
    """
    stage = zero_stage(spec)
    backend, reason = _choose_backend(spec, machine)
    _check_engine_ranks(backend, machine.ranks)
    steps = _count_steps(spec, rows)
    updates = spec.training.updates_per_rollout
    other_shapes = other_shapes or {}
    return Plan(
        backend=backend,
        evaluation_backend=TransformersBackend() if isinstance(backend, ReplayBackend) else backend,
        backend_reason=reason,
        zero_stage=stage,
        ranks=machine.ranks,
        prompts_per_rank=prompts_per_rank(spec, machine.ranks),
        rollouts_per_step=spec.training.prompts_per_step * spec.rollout.completions_per_prompt,
        updates_per_step=updates,
        rows=rows,
        steps=steps,
        oldest_rollout=(spec.rollout.max_staleness + 1) * updates - 1,
        needs_old_logprobs=spec.needs_old_logprobs,
        statistics=_statistics(spec),
        objective=_objective(spec),
        roles=tuple(_roles(spec)),
        weight_sync=_describe_sync(spec, backend, shape),
        processes=describe_processes(spec, backend, machine),
        disk=estimate_disk(spec, shape) if shape else None,
        memory=plan_memory(spec, backend, machine, shape, other_shapes) if shape else None,
        memory_gib=machine.memory_gib,
        step_time=estimate_step_time(spec, backend, machine, shape, other_shapes),
        derived=(
            *_precision_notes(spec, machine, stage),
            *_attention_notes(spec),
            *_backend_notes(spec, backend, reason, stage),
            *_engine_notes(spec, backend, machine, shape),
            *_default_notes(spec, steps, rows),
            *_teacher_lift_notes(spec, backend),
            *_served_teacher_notes(spec),
        ),
    )


def _count_steps(spec: ExperimentSpec, rows: int | None) -> int | None:
    """The number of rollout batches; None for epochs of an unknown number of rows."""
    training = spec.training
    if training.steps is None and rows is not None and training.epochs is not None:
        return max(1, round(training.epochs * rows / training.prompts_per_step))
    return training.steps


def _precision_notes(spec: ExperimentSpec, machine: Machine, stage: int) -> Iterator[str]:
    if stage != spec.training.zero_stage:
        yield "training.zero_stage 0 runs as 1: stage 0 has no float32 gradients in bfloat16"
    if stage in (1, 2) and machine.ranks == 1 and spec.model.dtype == "float32" and not spec.training.offload:
        yield f"training.zero_stage {stage}: one rank has nothing to shard; 0 trains the same with fewer copies"
    if machine.emulates_bfloat16 and spec.model.dtype == "bfloat16":
        yield "model.dtype bfloat16 is emulated on this machine: float32 is several times faster"


def _attention_notes(spec: ExperimentSpec) -> Iterator[str]:
    several = spec.rollout.completions_per_prompt > 1
    if several and spec.training.share_prompts and spec.model.attn_implementation == "flash_attention_2":
        yield "training.share_prompts is off: flash_attention_2 takes no mask for shared rows"


def _backend_notes(
    spec: ExperimentSpec, backend: ChosenBackend | ReplayBackend, reason: str, stage: int
) -> Iterator[str]:
    gathers = isinstance(backend, TransformersBackend) and not _external_teacher_samples(spec)
    if stage == 3 and gathers:
        yield "sampling gathers every layer for every token: vLLM gathers the weights once per batch"
    if isinstance(spec.rollout.backend, AutoBackend):
        yield f"rollout.backend auto is {backend.kind}: {reason}"


def _engine_notes(
    spec: ExperimentSpec, backend: ChosenBackend | ReplayBackend, machine: Machine, shape: ShapeSpec | None
) -> Iterator[str]:
    """A vLLM engine whose share of the memory does not hold its weights."""
    if shape and isinstance(backend, VllmBackend):
        share, weights = engine_gib(spec, backend, machine, shape), engine_weights_gib(spec, backend, shape)
        if share <= weights:
            yield (
                f"rollout.backend.gpu_memory_utilization {backend.gpu_memory_utilization:g} is {share:.1f} GiB, too "
                f"little for vLLM's weights of {weights:.1f} GiB and its cache"
            )


def _default_notes(spec: ExperimentSpec, steps: int | None, rows: int | None) -> Iterator[str]:
    sampling = f"{spec.rollout.temperature:g}, the sampling temperature"
    for name, term in spec.losses.items():
        if isinstance(term, Distillation) and term.temperature is None:
            yield f"losses.{name}.temperature is {sampling}"
    if spec.training.steps is None and steps is not None:
        yield f"{spec.training.epochs:g} epochs of {rows} rows are {steps} steps"
    if rows and spec.training.prompts_per_step > rows:
        repeats, there = spec.training.prompts_per_step / rows, counted(rows, "row")
        yield f"training.prompts_per_step is more than the {there}: a batch holds each row {repeats:.3g} times"


def _teacher_lift_notes(spec: ExperimentSpec, backend: ChosenBackend | ReplayBackend) -> Iterator[str]:
    teacher = spec.teacher
    if not spec.evaluation:
        return
    if isinstance(backend, VllmEngine) and any(spec.external_teachers()):
        yield "evaluation.teacher_lift samples the external teacher with transformers"
    if teacher and teacher.weights.cannot_sample:
        yield f"evaluation.teacher_lift is not measured: a {teacher.weights.kind} teacher does not sample"
    elif teacher and teacher.blend and teacher.sees:
        yield "evaluation.teacher_lift samples the teacher without its blend"


def _served_teacher_notes(spec: ExperimentSpec) -> list[str]:
    """What a teacher server must support, and what it cannot report."""
    k = spec.served_top_k
    if k is None:
        return []
    text = f"each server is asked for the sampled token's log-probability and for the teacher's {k} likeliest tokens"
    if k == 0:
        text = "each server is asked for the sampled token's log-probability"
    if k > VLLM_DEFAULT_MAX_LOGPROBS:
        text += f", so it must be started with --max-logprobs {k} or more"
    notes = [text, "the teacher's entropy is not measured: a server returns only the likeliest tokens"]
    if any(w for _, w in spec.teachers() if not isinstance(w, ServedWeights)):
        notes.append(f"the other routes' teachers are limited to their {k} likeliest tokens, too")
    return notes


def prompts_per_rank(spec: ExperimentSpec, ranks: int) -> int:
    """Returns the prompts per step on each rank.  Raises UnreadableInput if they cannot be divided equally."""
    if fault := indivisible(spec, ranks):
        raise UnreadableInput(f"training.{fault}", hint=f"use a multiple of {ranks}")
    return spec.training.prompts_per_step // ranks


def _check_engine_ranks(backend: ChosenBackend | ReplayBackend, ranks: int) -> None:
    """Raise UnreadableInput unless the ranks can be divided into groups that share an engine."""
    if isinstance(backend, VllmBackend) and ranks % backend.tensor_parallel_size:
        raise UnreadableInput(
            f"rollout.backend.tensor_parallel_size is {backend.tensor_parallel_size}, but there "
            f"{'is' if ranks == 1 else 'are'} {counted(ranks, 'rank')}, which share the engines",
            hint="start a multiple of it (--processes, or machine.ranks in `sdkit plan`)",
        )


def _objective(spec: MethodSpec) -> tuple[str, ...]:
    """One line per loss term, then those of the blend and of the route, if there are any."""
    lines = [f"{name}: {term.describe(spec.rollout.temperature)}" for name, term in spec.losses.items()]
    if spec.blend:
        lines.append(f"blend: teacher Q ∝ {spec.blend.describe()}")
    if spec.route:
        lines.append(f"route: {spec.route.describe()}")
    return tuple(lines)


def _statistics(spec: ExperimentSpec) -> tuple[str, ...]:
    statistics = required_statistics(spec.losses)
    if not spec.needs_old_logprobs:
        return _statistic_lines(statistics)
    settings = ("training.updates_per_rollout", *statistics.pop("student_logprobs", ()))
    return _statistic_lines({"student_logprobs": settings, **statistics})


def _statistic_lines(statistics: Mapping[Statistic, tuple[str, ...]]) -> tuple[str, ...]:
    """One line per statistic: `student entropy for losses.distil.mask.student_entropy_top`."""
    return tuple(
        f"{name.replace('_logprobs', ' log-probabilities').replace('_', ' ')} for {', '.join(settings)}"
        for name, settings in statistics.items()
    )


def _choose_backend(spec: ExperimentSpec, machine: Machine) -> tuple[ChosenBackend | ReplayBackend, str]:
    match spec.rollout.backend:
        case AutoBackend() if isinstance(spec.rollout.sampled_by, DatasetSamples) and not spec.evaluation:
            return (TransformersBackend(), "the data set holds the completions, so nothing is sampled")
        case AutoBackend() if _external_teacher_samples(spec):
            return TransformersBackend(), "an external teacher samples, and vLLM holds the student"
        case AutoBackend() if any(temperature > HOTTEST_VLLM for _, temperature in spec.temperatures()):
            return TransformersBackend(), f"vLLM samples at temperatures up to {HOTTEST_VLLM:g}"
        case AutoBackend():
            if machine.vllm:
                return VllmBackend(), f"vLLM {machine.vllm} is installed"
            return TransformersBackend(), "vLLM is not installed"
        case (TransformersBackend() | VllmBackend() | VllmServerBackend() | ReplayBackend()) as chosen:
            return chosen, "the spec says so"
        case other:
            assert_never(other)


def _external_teacher_samples(spec: ExperimentSpec) -> bool:
    return spec.rollout.sampled_by.uses_teacher_weights and any(spec.external_teachers())


def _roles(spec: ExperimentSpec) -> list[str]:
    lora = spec.model.lora
    trained = f"LoRA rank {lora.r}" if lora else "all weights"
    if quantized := spec.model.quantized:
        trained += f" over base weights in {quantized}"
    roles = [f"student: {spec.model.path}, {trained}, {spec.model.dtype}, float32 masters"]
    if spec.teacher:
        place = spec.teacher.weights.describe_place(bool(spec.model.lora))
        roles.append(f"teacher: {spec.teacher.describe()}{place}")
    if spec.needs_reference:
        own = "the student with its adapter off" if spec.model.lora else "a copy of the model"
        shared = "the teacher" if has_frozen_teacher(spec) else own
        roles.append(f"reference: the frozen start model ({shared})")
    base = spec.blend and spec.blend.base
    if isinstance(base, ExternalWeights):
        roles.append(f"base of the blend: {base.describe()}{base.describe_place(bool(spec.model.lora))}")
    roles.append(f"sampler: {spec.rollout.describe()}")
    if spec.environment:
        longest = spec.longest_completion()
        roles.append(f"environment: {spec.environment.describe()}; at most {longest} tokens after the prompt")
    if views := teacher_rows(spec):
        roles.append(_describe_rows(spec, views))
    return roles


def _describe_rows(spec: ExperimentSpec, views: TeacherRows) -> str:
    """The rows of a teacher whose context differs by turn, and what they cost in the longest trajectory."""
    text = f"teacher's rows: one for each turn, up to {views.rows} a trajectory"
    if spec.sees is None or spec.sees.max_prompt_tokens is None:
        return text
    once, budget = views.prompt + views.completion, spec.training.micro_batch_tokens
    passes = 1 if zero_stage(spec) == 3 else -(-views.rows // max(budget // views.longest, 1))
    size = f"one pass of {views.padded} tokens" if passes == 1 else f"{passes} passes of at most {budget} tokens"
    return (
        f"{text}, the longest of {views.longest} tokens; together {views.tokens}, "
        f"{views.tokens / once:.1f} times one row of all turns, in {size}"
    )


def _describe_sync(spec: ExperimentSpec, backend: object, shape: ShapeSpec | None) -> str:
    sampled_by = spec.rollout.sampled_by
    if isinstance(sampled_by, DatasetSamples):
        return "the sampler gets weights before each evaluation only"
    if isinstance(backend, ReplayBackend):
        return "recorded rollouts; the sampler of evaluations shares the training weights"
    if not isinstance(backend, VllmEngine):
        whose = "teacher's" if _external_teacher_samples(spec) else "training"
        return f"the sampler shares the {whose} weights"
    whose = "teacher" if sampled_by.uses_teacher_weights else "student"
    form = " (adapters merged into a copy)" if spec.model.lora else ""
    form += ", a block at a time" if spec.training.zero_stage == 3 else ""
    if isinstance(backend, VllmServerBackend):
        size = f" of {shape.parameters * BYTES[spec.model.dtype] / GIB:.2f} GiB" if shape else ""
        who = f"each of {len(backend.urls)} servers" if len(backend.urls) > 1 else "the server"
        ahead = spec.rollout.max_staleness
        early = f", {counted(ahead, 'batch', 'batches')} ahead of training" if ahead else ""
        return (
            f"{who} gets the {whose}'s weights by a file{size}{form} before each rollout batch{early}, "
            "checked by a canary sequence"
        )
    return f"vLLM gets the {whose}'s weights before each rollout batch{form}, checked by a canary sequence"
