"""The parts of a completion of several turns: what the student sampled, and what it was shown in between.

Knows nothing of tensors, rewards or environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import asdict, frozen

ASSISTANT = "assistant"
"""The role of a sampled span."""
OBSERVATION = "cyan"
"""The colour, on a terminal, of what the student did not sample."""
Ending = Literal["done", "max_turns", "length", "max_tokens", "environment_error"]
"""Why a trajectory ended: the environment ended it; its last turn was the last allowed; a turn reached
`rollout.max_new_tokens`; the trajectory reached its own limit; the environment failed."""


@frozen(kw_only=True)
class Span:
    """Tokens start..end of a completion, of one turn and one role."""

    role: str  # "assistant": sampled by the student; else the role of an observation
    turn: int  # from 1; an observation belongs to the turn that it follows
    start: int
    end: int
    # Of an observation: where its own text stands, without the chat template's tokens around it.
    body: tuple[int, int] | None = None

    @property
    def sampled(self) -> bool:
        return self.role == ASSISTANT


def sampled_positions(spans: Sequence[Span], length: int) -> Sequence[int]:
    """The positions that were sampled in a completion of `length` tokens, ascending; without spans, all of them."""
    if not spans:
        return range(length)
    return [position for span in spans if span.sampled for position in range(span.start, span.end)]


def turns_at(spans: Sequence[Span], positions: Sequence[int]) -> list[int]:
    """The turn of each of these positions, which are ascending; without spans, 1."""
    turns, span = [], iter(spans)
    current = next(span, None)
    for position in positions:
        while current and position >= current.end:
            current = next(span, None)
        turns.append(current.turn if current else 1)
    return turns


def rewards_by_turn(turns: int, rewards: Sequence[float], ending: str | None) -> Mapping[int, float]:
    """The rewards by turn of a trajectory of so many turns; empty if some turn has none, so that their turns are unknown."""
    return dict(enumerate(rewards, 1)) if len(rewards) == turns or ending == "environment_error" else {}


def last_turn(ids: Sequence[int], spans: Sequence[Span]) -> Sequence[int]:
    """The ids of a completion's last turn; without spans, all of them."""
    return ids[spans[-1].start :] if spans else ids


def check_spans(spans: Sequence[Span], length: int) -> None:
    """Raises ValueError unless the spans cover a completion of `length` tokens without gaps, and the last is sampled."""
    end = 0
    for span in spans:
        if span.start != end or span.end < span.start:
            raise ValueError(f"a span starts at {span.start}, after one that ends at {end}")
        end = span.end
    if spans and (end != length or not spans[-1].sampled):
        raise ValueError(f"the spans end at {end}, the completion of {length} tokens with a sampled turn")


def span_records(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The spans as JSON values; `spans_of` reads them."""
    return [asdict(span) for span in spans]


def spans_of(records: Sequence[Mapping[str, Any]]) -> tuple[Span, ...]:
    """The spans that `span_records` wrote."""
    return tuple(
        Span(**{**record, "body": None if record["body"] is None else tuple(record["body"])}) for record in records
    )
