"""What an environment is asked, and what it answers.  Knows text, never tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from sdkit.batches import Row
from sdkit.spans import Ending, Message, Turn

__all__ = ["Environment", "Message", "Opened", "Reply", "Turn"]


@frozen(kw_only=True)
class Opened:
    """A new trajectory."""

    handle: Any  # what stands for it in the environment
    text: str | None = None  # appended to the last user message of the first prompt
    error: str | None = None  # what went wrong; the trajectory ends after its first turn


@frozen(kw_only=True)
class Reply:
    """An environment's answer to one turn."""

    messages: tuple[Message, ...] = ()  # what the student is shown; none: the trajectory is done
    reward: float | None = None  # of the turn
    error: str | None = None  # what went wrong; the trajectory ends
    feedback: str | None = None  # on the turn, for a teacher's context
    ending: Ending | None = None  # why the trajectory is done (default: `done`)


class Environment(Protocol):
    """Answers the turns of trajectories."""

    max_turns: int

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools that the student may call, as chat templates take them; empty: there are none."""
        ...

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        """Returns new trajectories, given their rows and seeds."""
        ...

    def reply(self, turns: Sequence[tuple[Any, Turn]]) -> list[Reply]:
        """Returns one reply per handle and its turn, in order."""
        ...

    def end(self, trajectories: Sequence[Any]) -> list[float | None]:
        """Ends trajectories, by handle; returns the reward that the environment gives each, if it gives one."""
        ...

    def close(self) -> None:
        """Releases the environment's processes."""
        ...
