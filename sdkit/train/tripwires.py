"""Tripwires: detect training steps that teach nothing from their metrics, with the cause and where to look.

They read only lines of metrics.jsonl, so a resumed run gives the same warnings from its history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

StepMetrics = Mapping[str, float]
"""The metrics of one training step, by name."""
Cause = Callable[[StepMetrics], str | None]
"""Returns what is wrong with a step; None if this cause does not apply."""

NO_KL = 1e-6
"""Nats per token below which two models agree up to float32 rounding."""
NO_GRADIENT = 1e-6
"""Gradient norm below which there is only noise; Adam would still move the weights by it."""


@frozen(kw_only=True)
class TripwireWarning:
    """A tripwire that triggered."""

    wire: str
    first: int  # first step with this cause
    step: int
    cause: str
    look_at: str
    stops: bool = False  # whether it ends the run

    def __str__(self) -> str:
        return f"steps {self.first} to {self.step}: {self.cause}"


def triggered(lines: Sequence[StepMetrics], patience: int) -> list[TripwireWarning]:
    """The tripwires that trigger at the last line: after `patience` degenerate steps in a row, and only once.

    `lines` are a run's training steps in order; only the last `patience` + 1 matter.
    """
    recent = lines[-patience - 1 :]
    if len(recent) < patience:
        return []
    warnings: list[TripwireWarning] = []
    for name, (cause, look_at) in TRIPWIRES.items():
        bad = [cause(line) for line in recent]
        onset = all(bad[-patience:]) and (len(bad) == patience or not bad[0])
        if onset and (now := bad[-1]):
            first, last = int(recent[-patience]["step"]), int(recent[-1]["step"])
            warnings.append(TripwireWarning(wire=name, first=first, step=last, cause=now, look_at=look_at))
    return warnings


def _flat_rewards(line: StepMetrics) -> str | None:
    if line.get("rollout/no_advantage", 0) < 1:
        return None
    return "rewards are flat: every group's rollouts got one and the same, so no advantage is left"


def _no_tokens(line: StepMetrics) -> str | None:
    if line.get("rollout/kept") == 0:
        return "no rollout was kept: rollout.keep let none through, so there was no update"
    empty = [term for term in _terms(line) if line.get(f"{term}/tokens") == 0]
    if not empty:
        return None
    counted = f"{' and '.join(empty)} counted no token"
    if line.get("rollout/with_teacher") == 0:
        return f"{counted}: no rollout had a teacher prompt"
    return f"{counted}: mask and route left none"


def _no_success(line: StepMetrics) -> str | None:
    if line.get("teacher/success_groups", 1) > 0 or _no_tokens(line):
        return None
    return "no group had a successful rollout, so no teacher was shown one"


def _no_divergence(line: StepMetrics) -> str | None:
    for term in _terms(line):
        # With sampled tokens only k1 is known; a reference KL also has k1, which starts at 0.
        names = ("forward_kl", "reverse_kl") if f"{term}/forward_kl" in line else ("k1",)
        kls = [abs(line[f"{term}/{name}"]) for name in names if f"{term}/{name}" in line]
        has_reference = f"{term}/reference_kl" in line
        if kls and not has_reference and line.get(f"{term}/tokens") and max(kls) <= NO_KL:
            return f"{term} finds no divergence between teacher and student ({max(kls):.1e} nats per token)"
    return None


def _all_truncated(line: StepMetrics) -> str | None:
    if line.get("rollout/finished", 1) > 0:
        return None
    length = line.get("rollout/completion_tokens", 0)
    return f"every completion was cut at the length limit ({length:.0f} tokens)"


def _no_gradient(line: StepMetrics) -> str | None:
    """No gradient, unless another tripwire explains it."""
    if line.get("grad_norm", 1) > NO_GRADIENT or any(c(line) for c in (*SPECIFIC_CAUSES, _all_truncated)):
        return None
    norm, loss = line["grad_norm"], line.get("loss", 0)
    if abs(loss) <= NO_KL:
        return f"there is no signal: the loss is 0 and the gradient's norm {norm:.1e}"
    return f"the loss is {loss:.4f}, but its gradient is 0 (norm {norm:.1e}): nothing reaches the weights"


def _terms(line: StepMetrics) -> list[str]:
    return [name.removeprefix("loss/") for name in line if name.startswith("loss/")]


SPECIFIC_CAUSES: tuple[Cause, ...] = (_flat_rewards, _no_tokens, _no_divergence)

TRIPWIRES: Mapping[str, tuple[Cause, str]] = {
    "flat_rewards": (
        _flat_rewards,
        "look at reward/* and samples/: prompts that are too hard or too easy, or a reward that misreads the answers",
    ),
    "nothing_counted": (
        _no_tokens,
        "look at teacher/*_used, teacher/success_groups and */empty_rows: teacher.sees, losses.*.mask, rollout.keep",
    ),
    "no_success": (
        _no_success,
        "look at reward/* and the slot's threshold; easier prompts or more completions_per_prompt make successes likelier",
    ),
    "no_divergence": (
        _no_divergence,
        "the teacher says what the student says: look at what it sees (`sdkit plan SPEC --data 2`) and at its weights",
    ),
    "all_truncated": (
        _all_truncated,
        "raise rollout.max_new_tokens, or look in samples/ for completions that never end",
    ),
    "no_gradient": (
        _no_gradient,
        "look at coefficients and schedules of losses, clips that bind everywhere, and frozen or adapted layers",
    ),
}
