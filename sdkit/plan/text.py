"""Formats a plan as text: the output of `sdkit plan` and the golden files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdkit.language.specs import ExperimentSpec, VllmEngine
from sdkit.plan.plan import MethodPlan, Plan

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
        "batches": [
            f"rollout batches: {steps}",
            f"each: {batch}; {plan.prompts_per_rank} prompts on each of {plan.ranks} rank{'s' * (plan.ranks > 1)}",
            f"optimizer steps: {updates} ({plan.updates_per_step} per rollout batch)",
            f"micro-batches: up to {training.micro_batch_tokens} padded tokens, sorted by length{sharing}",
            f"oldest rollout: {plan.oldest_rollout} optimizer steps behind",
        ],
        "weights": [
            f"ZeRO stage {plan.zero_stage}, {spec.model.dtype} forward, float32 masters and moments{_placement(spec, plan)}",
            f"backend: {plan.backend.kind} ({plan.backend_reason})",
            *([f"engine: {plan.backend.describe()}"] if isinstance(plan.backend, VllmEngine) else ()),
            plan.weight_sync,
        ],
        "memory per rank (estimate)": _memory(plan),
        "time of a step (estimate)": _time(plan),
        "derived": plan.derived,
    }
    return _format_sections(sections)


def render_method(plan: MethodPlan) -> str:
    """Returns the plan of a method page, which has only the first three sections."""
    return _format_sections({"objective": plan.objective, "roles": plan.roles, STATISTICS: plan.statistics})


def _format_sections(sections: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(
        "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines
    )


def _placement(spec: ExperimentSpec, plan: Plan) -> str:
    """How weights are sharded and offloaded."""
    sharded = "; every model sharded over the ranks" if plan.zero_stage == 3 else ""
    offloaded = " and ".join(spec.training.offload)
    return sharded + (f"; {offloaded} in CPU memory" if offloaded else "")


def _memory(plan: Plan) -> list[str]:
    if not plan.memory:
        return ["unknown: the model's shape is not at hand; state it as model.shape"]
    lines = [f"{share.gib:8.2f} GiB  {share.label}" for share in plan.memory]
    lines.append(f"{plan.peak_gib:8.2f} GiB  total")
    if plan.memory_gib:
        lines.append(f"{plan.memory_gib:8.2f} GiB  available")
        if plan.peak_gib > plan.memory_gib:
            lines.append("more than available: train LoRA adapters, or lower training.micro_batch_tokens")
    return lines


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
