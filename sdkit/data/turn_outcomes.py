"""The turns of a trajectory as a teacher's context reads them: what stands before each, and what followed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdkit.batches import Completion, TurnOutcome
from sdkit.spans import Span

Decode = Callable[[Sequence[int]], str]


def turn_outcomes(completion: Completion, decode: Decode) -> list[tuple[Span, TurnOutcome]]:
    """Returns the span and the outcome of each turn that was sampled; a completion without spans is one turn.

    `decode` returns the text of an observation's ids.
    """
    ids, feedback = completion.ids, completion.turn_feedback
    shown = [(span, (span.role, decode(ids[slice(*span.body)]))) for span in completion.parts if span.body]
    turns = [span for span in completion.parts if span.is_turn]
    followed = [[message for span, message in shown if span.turn == turn.turn] for turn in turns]
    followed = [*followed[:-1], [*followed[-1], *completion.unanswered]]
    outcomes: list[tuple[Span, TurnOutcome]] = []
    for number, turn in enumerate(turns):
        if not turn.sampled:
            continue
        users = [span.body for span, (role, _) in shown if role == "user" and span.end <= turn.start]
        outcome = TurnOutcome(
            history=tuple(ids[: turn.start]),
            last_user=users[-1] if users else None,
            feedback=feedback[number] if number < len(feedback) else None,
            later=followed[number:],
            number=turn.turn,
            written=completion.written or "",
        )
        outcomes.append((turn, outcome))
    return outcomes
