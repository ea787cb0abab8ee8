"""Formats a plan as text: the output of `sdkit plan` and the golden files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sdkit.language.best_metric import best_metric
from sdkit.language.errors import counted
from sdkit.language.specs import ExperimentSpec, VllmEngine
from sdkit.plan.plan import MethodPlan, Plan

NEARLY_FULL = 0.9
"""Share of the memory above which an estimate may not fit."""
STATISTICS = "measured before the first update on each batch"


def render_plan(spec: ExperimentSpec, plan: Plan) -> str:
    """Returns the plan of a run as sections of `name: value` lines."""
    training = spec.training
    steps = (
        f"{plan.steps}"
        if plan.steps is not None
        else f"{training.epochs:g} epochs, converted to steps when the data is read"
    )
    updates = plan.total_updates if plan.total_updates is not None else "known when the data is read"
    batch = (
        f"{training.prompts_per_step} prompts × {spec.rollout.completions_per_prompt} completions "
        f"= {plan.rollouts_per_step} rollouts"
    )
    shares_prompts = training.share_prompts and spec.rollout.completions_per_prompt > 1
    sharing = ", the prompt of a group stored once" if shares_prompts else ""
    sections: dict[str, Sequence[str]] = {
        "objective": plan.objective,
        "roles": plan.roles,
        STATISTICS: plan.statistics,
        "a trajectory": list(_trajectory(spec)),
        "batches": [
            *_rows(spec, plan),
            f"rollout batches: {steps}{_early_end(spec)}",
            f"each: {batch}; {plan.prompts_per_rank} prompts on each of {plan.ranks} rank{'s' * (plan.ranks > 1)}",
            f"optimizer steps: {updates} ({plan.updates_per_step} per rollout batch)",
            f"micro-batches: up to {training.micro_batch_tokens} padded tokens, sorted by length{sharing}",
            f"oldest rollout: {plan.oldest_rollout} optimizer steps behind",
        ],
        "panel": _panel(spec),
        "processes": plan.processes,
        "weights": [
            f"ZeRO stage {plan.zero_stage}, {spec.model.dtype} forward, float32 masters and moments{_placement(spec, plan)}",
            *_reduction(spec, plan),
            f"backend: {plan.backend.kind} ({plan.backend_reason})",
            *([f"engine: {plan.backend.describe()}"] if isinstance(plan.backend, VllmEngine) else ()),
            plan.weight_sync,
        ],
        f"memory per rank (estimate){_at_phase(plan)}": _memory(plan),
        "disk (estimate)": _disk(spec, plan),
        "time of a step (estimate)": _time(plan),
        "derived": plan.derived,
    }
    return _format_sections(sections)


def _trajectory(spec: ExperimentSpec) -> Iterator[str]:
    """The messages of a trajectory that goes on after its first turn; nothing without an environment."""
    environment = spec.environment
    if environment is None:
        return
    sampled = f"up to {counted(spec.rollout.max_new_tokens, 'token')}, sampled"
    shown = f"up to {counted(environment.max_observation_tokens, 'token')}, shown, not sampled"
    yield "prompt: the chat of the column `prompt`"
    if start := spec.rollout.starts_with:
        yield f"first: {start.describe()}, which the environment answers; shown, not sampled"
    yield f"turn 1, assistant: {sampled}"
    yield f"turn 1, user: {environment.reply_text}; {shown}"
    yield f"turn 2, assistant: {sampled}"
    if environment.max_turns > 2:
        yield f"… up to turn {environment.max_turns}"
    yield "ending: done when there is no reply, max_turns, length or max_tokens at a limit, environment_error"


def render_method(plan: MethodPlan) -> str:
    """Returns the plan of a method page, which has only the first three sections."""
    return _format_sections({"objective": plan.objective, "roles": plan.roles, STATISTICS: plan.statistics})


def _format_sections(sections: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(
        "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines
    )


def _rows(spec: ExperimentSpec, plan: Plan) -> Iterator[str]:
    """The number of rows and how often the run uses each; nothing if it is not known."""
    if plan.rows is None:
        return
    suites = ", before those held out are dropped" if spec.suites else ""
    uses = ""
    if plan.steps is not None:
        uses = f"; the run uses each {plan.steps * spec.training.prompts_per_step / plan.rows:.3g} times"
    yield f"rows: {plan.rows}{suites}{uses}"


def _early_end(spec: ExperimentSpec) -> str:
    """What may end the run before its last step."""
    output = spec.output
    stops = output.collapse.stops if output.tripwire_steps else ()
    return f", fewer if {' or '.join(stops)} collapses" if stops else ""


def _panel(spec: ExperimentSpec) -> list[str]:
    """The entries of the evaluation's panel, and when they are evaluated."""
    evaluation = spec.evaluation
    if not evaluation or not evaluation.panel:
        return []
    when = f", and every {counted(evaluation.panel_every, 'step')}" if evaluation.panel_every else ""
    return [*(entry.describe() for entry in evaluation.panel), f"evaluated at the start and the end{when}"]


def _disk(spec: ExperimentSpec, plan: Plan) -> list[str]:
    if plan.disk is None:
        return []
    output = spec.output
    when = "if the run is stopped"
    if output.checkpoint_every:
        kept = f", {output.keep_checkpoints + 1} of them while one is written"
        when = f"every {counted(output.checkpoint_every, 'step')}{kept}"
    best = ""
    if metric := best_metric(spec):
        best = f", and as much for the best one: {metric[1]} {metric[0]} is better"
    return [
        f"{plan.disk.checkpoint:8.2f} GiB  a checkpoint, {when}",
        f"{plan.disk.model:8.2f} GiB  the trained model{best}",
    ]


def _placement(spec: ExperimentSpec, plan: Plan) -> str:
    """How weights are sharded and offloaded."""
    sharded = "; every model sharded over the ranks" if plan.zero_stage == 3 else ""
    offloaded = " and ".join(what.replace("_", " ") for what in spec.training.offload)
    return sharded + (f"; {offloaded} in CPU memory" if offloaded else "")


def _at_phase(plan: Plan) -> str:
    return f", at its peak in the {plan.memory.phase}" if plan.memory else ""


def _reduction(spec: ExperimentSpec, plan: Plan) -> list[str]:
    """How gradients are summed over the ranks, if there are several, and whether CUDA kernels are deterministic."""
    training = spec.training
    lines = [f"gradients are summed over the ranks in {training.reduce_dtype}"] if plan.ranks > 1 else []
    return lines + ["deterministic CUDA kernels for scoring and updates"] * training.deterministic


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        return ["unknown: the model's shape is not at hand; state it as model.shape"]
    lines = [f"{share.gib:8.2f} GiB  {share.label}" for share in memory.shares if not share.host]
    lines.append(f"{memory.peak_gib:8.2f} GiB  total")
    if plan.memory_gib:
        lines.append(f"{plan.memory_gib:8.2f} GiB  available")
        if memory.peak_gib > plan.memory_gib:
            lines.append("more than available" + (": one of these changes alone leads to" if memory.savings else ""))
            lines += [f"{gib:8.2f} GiB  {change}" for change, gib in memory.savings]
        elif memory.peak_gib > NEARLY_FULL * plan.memory_gib:
            lines.append("nearly all of it: the estimate leaves out the device's context, NCCL and fragmentation")
    return [*lines, *(f"{share.gib:8.2f} GiB  {share.label}, in CPU memory" for share in memory.shares if share.host)]


def _time(plan: Plan) -> list[str]:
    time = plan.step_time
    if time is None:
        return []
    if time.unknown_reason:
        return [f"unknown: {time.unknown_reason}"]
    lines = [f"{phase.seconds:8.1f} s  {phase.label}" for phase in time.phases]
    lines.append(f"{time.seconds:8.1f} s  total")
    if plan.steps:
        hours = time.seconds * plan.steps / 3600
        lines.append(f"{hours:8.1f} h  for {plan.steps} steps, without evaluation")
    return [*lines, f"assumed: {time.assumptions}"]
