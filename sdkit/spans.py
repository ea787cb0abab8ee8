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
DEMONSTRATION = "demonstration"
"""The role of a turn that a trajectory started with: one of the data's demonstration, in the student's place."""
SAMPLED = (ASSISTANT,)
"""The roles of spans that the student sampled."""
TURNS = (ASSISTANT, DEMONSTRATION)
"""The roles of spans that the environment answers."""
Ending = Literal["done", "no_call", "max_turns", "length", "max_tokens", "timeout", "parse_error", "environment_error"]
"""Why a trajectory ended: the environment ended it; a turn called no tool; its last turn was the last allowed; a turn reached
`rollout.max_new_tokens`; the trajectory reached its own limit of tokens, or of seconds; a tool call could not be read; the environment failed."""
FINISHED: tuple[Ending, ...] = ("done", "no_call", "max_turns", "parse_error")
"""Endings of trajectories whose last turn is complete."""


@frozen(kw_only=True)
class Message:
    """A message that the student is shown after a turn."""

    role: Literal["user", "tool"]
    content: str
    name: str | None = None  # of the tool whose result it is


@frozen(kw_only=True)
class Call:
    """A tool call in a turn."""

    name: str
    arguments: Mapping[str, Any]


@frozen(kw_only=True)
class Turn:
    """What the student sampled in one turn, or a demonstration has in its place, as an environment reads it."""

    text: str  # without special tokens
    calls: tuple[Call, ...] = ()
    fault: str | None = None  # why its tool calls cannot be read; there are no `calls` then
    finished: bool = True  # False: cut by a limit; its tool calls are not read


@frozen(kw_only=True)
class Span:
    """Tokens start..end of a completion, of one turn and one role."""

    role: str  # "assistant": sampled by the student; "demonstration": a turn in its place; "user" or "tool": an observation
    turn: int  # from 1; an observation belongs to the turn that it follows
    start: int
    end: int
    # Of an observation: where its own text stands, without the chat template's tokens around it.
    body: tuple[int, int] | None = None

    @property
    def sampled(self) -> bool:
        return self.role == ASSISTANT

    @property
    def is_turn(self) -> bool:
        """Whether it is a turn, sampled or demonstrated, and no observation."""
        return self.role in TURNS


def ranges_of(spans: Sequence[Span], length: int, roles: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each span of these roles in a completion of `length` tokens: of an observation, its own text.

    Without spans, all of the completion was sampled.
    """
    if not spans:
        return [(0, length)] if ASSISTANT in roles else []
    return [span.body or (span.start, span.end) for span in spans if span.role in roles]


def positions_of(spans: Sequence[Span], length: int, roles: Sequence[str]) -> Sequence[int]:
    """The positions in `ranges_of`, ascending."""
    ranges = ranges_of(spans, length, roles)
    return range(*ranges[0]) if len(ranges) == 1 else [p for ends in ranges for p in range(*ends)]


def sampled_positions(spans: Sequence[Span], length: int) -> Sequence[int]:
    """The positions that were sampled in a completion of `length` tokens, ascending; without spans, all of them."""
    return positions_of(spans, length, SAMPLED)


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
    """Raises ValueError unless the spans cover a completion of `length` tokens without gaps, and the last is a turn."""
    end = 0
    for span in spans:
        if span.start != end or span.end < span.start:
            raise ValueError(f"a span starts at {span.start}, after one that ends at {end}")
        end = span.end
    if spans and (end != length or not spans[-1].is_turn):
        raise ValueError(f"the spans end at {end}, the completion of {length} tokens with a turn")


def span_records(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The spans as JSON values; `spans_of` reads them."""
    return [asdict(span) for span in spans]


def spans_of(records: Sequence[Mapping[str, Any]]) -> tuple[Span, ...]:
    """The spans that `span_records` wrote."""
    return tuple(
        Span(**{**record, "body": None if record["body"] is None else tuple(record["body"])}) for record in records
    )
