"""The environment that lets the student try again, with the feedback of a reward."""

from __future__ import annotations

from collections.abc import Sequence

from sdkit.environments.interface import Reply, Turn
from sdkit.language.specs import RetryEnvironment
from sdkit.language.templates import fill, parse
from sdkit.rewards.scorer import ScoredCompletion, Scorer


class Retry:
    """Judges every turn with one reward.  Raises BadData as the reward does."""

    def __init__(self, spec: RetryEnvironment, scorer: Scorer) -> None:
        self.max_turns = spec.max_turns
        self._spec = spec
        self._scorer = scorer
        self._says, self._without = parse(spec.says), parse(spec.without_feedback)

    def reply(self, turns: Sequence[Turn]) -> list[Reply]:
        return [self._reply(scored) for scored in self._scorer.score_all(turns)]

    def _reply(self, scored: ScoredCompletion) -> Reply:
        if scored.reward >= self._spec.threshold:
            return Reply(text=None, reward=scored.reward)
        template = self._says if scored.feedback else self._without
        text = fill(template, lambda field: scored.feedback or "")
        return Reply(text=text, reward=scored.reward)
