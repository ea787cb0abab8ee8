"""What an environment is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attrs import frozen

from sdkit.batches import Row

Turn = tuple[str, Row]
"""The text of a turn, and the row of its prompt."""


@frozen(kw_only=True)
class Reply:
    """An environment's answer to one turn."""

    text: str | None  # the next user turn; None: the trajectory is done
    reward: float | None = None  # of the turn


class Environment(Protocol):
    """Answers the turns of a batch of trajectories, without a memory of its own."""

    max_turns: int

    def reply(self, turns: Sequence[Turn]) -> list[Reply]:
        """Returns one reply per turn, in order."""
        ...
