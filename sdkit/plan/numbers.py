"""The derived numbers of a plan by name, for comparisons."""

from __future__ import annotations

from sdkit.language.specs import ExperimentSpec
from sdkit.plan.plan import Plan

Number = int | float | str


def derived_numbers(spec: ExperimentSpec, plan: Plan) -> dict[str, Number]:
    """Returns the numbers of a plan that are known and do not depend on the number of ranks."""
    rollouts, longest = plan.rollouts_per_step, plan.rollouts_per_step * spec.rollout.max_new_tokens
    numbers: dict[str, Number | None] = {
        "rollouts per step": rollouts,
        "completion tokens per step, at most": longest,
        "rollouts per optimizer step": rollouts / plan.updates_per_step,
        "optimizer steps": plan.total_updates,
        "rollouts of the run": plan.steps and plan.steps * rollouts,
        "completion tokens of the run, at most": plan.steps and plan.steps * longest,
        "oldest rollout, optimizer steps behind": plan.oldest_rollout,
        "ZeRO stage": plan.zero_stage,
        "sampling backend": plan.backend.kind,
    }
    return {name: number for name, number in numbers.items() if number is not None}
