"""What a teacher whose context differs by turn reads of a trajectory: one row for each turn.  Pure arithmetic."""

from __future__ import annotations

from attrs import frozen

from sdkit.language.specs import ExperimentSpec, NextTurns, OfRollouts, Slot, Written


@frozen(kw_only=True)
class TeacherRows:
    """The teacher's rows of the longest trajectory, whose turns are equally long."""

    rows: int
    prompt: int  # tokens of each row before the first turn, with the context
    completion: int  # tokens of the trajectory

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.completion

    @property
    def tokens(self) -> int:
        """Tokens of all rows: each has the prompt, and all turns up to its own."""
        return self.rows * self.prompt + round(self.completion * (self.rows + 1) / 2)

    @property
    def padded(self) -> int:
        """Tokens of all rows in one pass, padding included."""
        return self.rows * self.longest


def teacher_rows(spec: ExperimentSpec) -> TeacherRows | None:
    """Returns the teacher's rows of a trajectory; None if one row has all turns, or if there is no environment.

    A context without `max_prompt_tokens` counts as no longer than the student's prompt.
    """
    sees, environment = spec.sees, spec.environment
    if sees is None or environment is None or not sees.by_turn:
        return None
    prompt = sees.max_prompt_tokens or spec.rollout.max_prompt_tokens or 1
    return TeacherRows(rows=environment.max_turns, prompt=prompt, completion=spec.longest_completion())


def sampled_context_tokens(spec: ExperimentSpec) -> int:
    """Returns an estimate of the tokens of all slots that are filled after sampling; what is written is one answer."""
    written = spec.writer.max_new_tokens if spec.writer else 0
    slots = (slot for slot in spec.slots.values() if isinstance(slot, OfRollouts) and not isinstance(slot, Written))
    return written + sum(_value_tokens(spec, slot) for slot in slots)


def _value_tokens(spec: ExperimentSpec, slot: Slot) -> int:
    if isinstance(slot, NextTurns) and spec.environment:
        return slot.shown(spec.environment.max_turns) * spec.environment.max_observation_tokens
    return spec.rollout.max_new_tokens
