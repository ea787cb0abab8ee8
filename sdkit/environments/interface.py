"""What an environment is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from attrs import frozen

from sdkit.batches import Row


@frozen(kw_only=True)
class Reply:
    """An environment's answer to one turn."""

    text: str | None  # the next user turn; None: the trajectory is done
    reward: float | None = None  # of the turn
    error: str | None = None  # what went wrong; the trajectory ends


class Environment(Protocol):
    """Answers the turns of trajectories."""

    max_turns: int

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Any]:
        """Returns what stands for each new trajectory, given its row and a seed."""
        ...

    def reply(self, turns: Sequence[tuple[Any, str]]) -> list[Reply]:
        """Returns one reply per trajectory and text of its turn, in order."""
        ...

    def end(self, trajectories: Sequence[Any]) -> list[float | None]:
        """Ends trajectories; returns the reward that the environment gives each, if it gives one."""
        ...

    def close(self) -> None:
        """Releases the environment's processes."""
        ...
