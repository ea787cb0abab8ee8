"""Steps that teach nothing: how they show in a step's figures, what causes them, and where to look.

Knows lines of metrics.jsonl and nothing else, so a resumed run comes to the same warnings from its own history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

StepMetrics = Mapping[str, float]
"""The figures of one training step, by name."""
Cause = Callable[[StepMetrics], str | None]
"""What is wrong with a step, if this is."""

NO_KL = 1e-6
"""Nats per token below which two models say the same: rounding in float32."""
NO_GRADIENT = 1e-6
"""Of the gradient's norm; with Adam even this would move weights, by noise."""


@frozen(kw_only=True)
class TripwireWarning:
    """A tripwire that went off."""

    wire: str
    first: int  # step at which this began
    step: int
    cause: str
    look_at: str

    def __str__(self) -> str:
        return f"steps {self.first} to {self.step}: {self.cause}"


def triggered(lines: Sequence[StepMetrics], patience: int) -> list[TripwireWarning]:
    """The tripwires that go off at the last of these lines: `patience` degenerate steps in a row, now and not before.

    `lines` are a run's training steps in order; more than the last `patience` + 1 of them change nothing.
    """
    recent = lines[-patience - 1 :]
    if len(recent) < patience:
        return []
    found: list[TripwireWarning] = []
    for name, (cause, look_at) in TRIPWIRES.items():
        bad = [cause(line) for line in recent]
        onset = all(bad[-patience:]) and (len(bad) == patience or not bad[0])
        if onset and (now := bad[-1]):
            first, last = int(recent[-patience]["step"]), int(recent[-1]["step"])
            found.append(
                TripwireWarning(wire=name, first=first, step=last, cause=now, look_at=look_at)
            )
    return found


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
    told = f"{' and '.join(empty)} counted no token"
    if line.get("rollout/with_teacher") == 0:
        return f"{told}: no rollout had a teacher prompt"
    return f"{told}: mask and route left none"


def _no_success(line: StepMetrics) -> str | None:
    if line.get("teacher/success_groups", 1) > 0 or _no_tokens(line):
        return None
    return "no group had a successful rollout, so no teacher was shown one"


def _no_divergence(line: StepMetrics) -> str | None:
    for term in _terms(line):
        # Of one sampled token only k1 is known; a pull to the reference has one too, and begins at 0.
        names = ("forward_kl", "reverse_kl") if f"{term}/forward_kl" in line else ("k1",)
        kls = [abs(line[f"{term}/{name}"]) for name in names if f"{term}/{name}" in line]
        pulls = f"{term}/reference_kl" in line
        if kls and not pulls and line.get(f"{term}/tokens") and max(kls) <= NO_KL:
            return f"{term} finds no divergence between teacher and student ({max(kls):.1e} nats per token)"
    return None


def _all_truncated(line: StepMetrics) -> str | None:
    if line.get("rollout/finished", 1) > 0:
        return None
    length = line.get("rollout/completion_tokens", 0)
    return f"every completion was cut at the length limit ({length:.0f} tokens)"


def _no_gradient(line: StepMetrics) -> str | None:
    """Only where none of the others says why."""
    if line.get("grad_norm", 1) > NO_GRADIENT or any(
        c(line) for c in (*SPECIFIC_CAUSES, _all_truncated)
    ):
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
