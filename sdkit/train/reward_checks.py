"""Checks before training that the rewards can score a run's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sdkit.batches import Row
from sdkit.language.columns import leaf_rewards
from sdkit.language.errors import BadData, first_of
from sdkit.language.specs import (
    ChoiceReward,
    ExactReward,
    InstructionChecks,
    NumberReward,
    ReasoningGymReward,
    RegexReward,
    Reward,
    RewardModel,
)
from sdkit.rewards.scoring import Scorer, score

COMPARING_REWARDS = {ExactReward, NumberReward, ChoiceReward, RegexReward, ReasoningGymReward, InstructionChecks}
"""Rewards that only compare a completion with its row, without running user code or a model."""


def check_rewards(rewards: Mapping[str, Reward], scorers: Mapping[str, Scorer], rows: Sequence[Row]) -> None:
    """Raise BadData if a row lacks the right answer or the tests that a reward reads, or if a reward cannot score."""
    _check_answers(scorers, rows)
    _score_empty_completions(rewards, scorers, rows)


def _check_answers(scorers: Mapping[str, Scorer], rows: Iterable[Row]) -> None:
    first_reward: dict[str, str] = {}  # error message → the first reward that raised it
    for row in rows:
        for name, scorer in scorers.items():
            try:
                scorer.check_row(row)
            except BadData as error:
                first_reward.setdefault(error.message, name)
    if first_reward:
        path = ("rewards", next(iter(first_reward.values())))
        raise BadData(first_of(list(first_reward)), path=path)


def _score_empty_completions(
    rewards: Mapping[str, Reward], scorers: Mapping[str, Scorer], rows: Sequence[Row]
) -> None:
    """Score an empty completion: for every row if the reward only compares, for the first row if user code or a process
    scores.  A reward model was tried when it was opened.  Raises BadData as `score` does.
    """
    for name, scorer in scorers.items():
        kinds = {type(leaf) for leaf in leaf_rewards(rewards, name)}
        tried = rows if kinds <= COMPARING_REWARDS else rows[:1]
        if RewardModel not in kinds:
            score({name: scorer}, [""] * len(tried), tried)
