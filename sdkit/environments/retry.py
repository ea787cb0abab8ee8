"""The environment that lets the student try again, with the feedback of a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Row
from sdkit.environments.interface import Message, Opened, Reply, Turn
from sdkit.language.specs import RetryEnvironment
from sdkit.language.templates import fill, parse
from sdkit.rewards.scorer import ScoredCompletion, Scorer


class Retry:
    """Judges every turn with one reward; a row stands for its trajectory.  Raises BadData as the reward does."""

    def __init__(self, spec: RetryEnvironment, scorer: Scorer) -> None:
        self.max_turns = spec.max_turns
        self._spec = spec
        self._scorer = scorer
        self._says, self._without = parse(spec.says), parse(spec.without_feedback)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        return [Opened(handle=row) for row, _ in starts]

    def reply(self, turns: Sequence[tuple[Row, Turn]]) -> list[Reply]:
        return [self._reply(scored) for scored in self._scorer.score_all([(turn.text, row) for row, turn in turns])]

    def end(self, trajectories: Sequence[Row]) -> list[float | None]:
        return [None] * len(trajectories)

    def close(self) -> None:
        """There is nothing to release."""

    def _reply(self, scored: ScoredCompletion) -> Reply:
        if scored.reward >= self._spec.threshold:
            return Reply(reward=scored.reward, feedback=scored.feedback)
        template = self._says if scored.feedback else self._without
        text = fill(template, lambda field: scored.feedback or "")
        shown = Message(role="user", content=text)
        return Reply(messages=(shown,), reward=scored.reward, feedback=scored.feedback)
