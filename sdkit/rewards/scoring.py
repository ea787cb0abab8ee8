"""Rewards: a completion as text, and its row, to a number and perhaps a text.  Knows nothing of tokens or groups.

Answers are compared in `rewards_answers` and `rewards_math`, programs tested in `rewards_code`, models asked in
`rewards_model`, users' functions called in `rewards_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from attrs import frozen

from sdkit.batches import Row
from sdkit.language.errors import SdkitError, blaming
from sdkit.language.specs import (
    ChoiceReward,
    ExactReward,
    FileReward,
    MathVerifyReward,
    NumberReward,
    PythonTests,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Reward,
    RewardModel,
    WeightedReward,
)
from sdkit.rewards import answers as answers
from sdkit.rewards.file import function_reward
from sdkit.rewards.math import math_verify
from sdkit.rewards.model import reward_model
from sdkit.rewards.programs import python_tests
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer

RewardScores = Mapping[str, Sequence[ScoredCompletion]]
"""Per reward: what it made of each completion."""


def open_reward(
    reward: Reward,
    base: Path,
    source: ReasoningGymSource | None,
    opened: Mapping[str, Scorer] | None = None,
) -> Scorer:
    """The scorer of one reward; a completion without an answer scores 0.

    `base` is the folder that relative paths start from; `source` is where the rows come from, if reasoning-gym;
    `opened` are the rewards that a weighted sum names.  Raises BadData where the reward cannot be opened and
    BadEnvironment where the machine lacks what it needs; the scorer raises BadData where a row lacks the right answer,
    or a user's function is late, fails or returns no finite number.
    """
    match reward:
        case ReasoningGymReward():
            return answers.task_scorer(reward, source)
        case ExactReward():
            return answers.exact(reward)
        case NumberReward():
            return answers.number(reward)
        case ChoiceReward():
            return answers.choice(reward)
        case RegexReward():
            return answers.regex(reward)
        case MathVerifyReward():
            return math_verify(reward)
        case RewardModel():
            return reward_model(reward, base)
        case PythonTests():
            return python_tests(reward)
        case FileReward():
            return function_reward(reward, base)
        case WeightedReward():
            return _sum(
                {name: (weight, (opened or {})[name]) for name, weight in reward.parts.items()}
            )
        case _:
            assert_never(reward)


def open_rewards(
    rewards: Mapping[str, Reward],
    names: Iterable[str],
    base: Path,
    source: ReasoningGymSource | None,
) -> dict[str, Scorer]:
    """The named rewards of a spec, each opened once.  Raises as `open_reward` does, saying which reward it was."""
    opened: dict[str, Scorer] = {}

    def open_one(name: str) -> Scorer:
        if name not in opened:
            reward = rewards[name]
            for part in reward.parts if isinstance(reward, WeightedReward) else ():
                open_one(part)
            try:
                with blaming("rewards", name):
                    opened[name] = open_reward(reward, base, source, opened)
            except SdkitError as error:
                message = f"rewards.{name}: {error.message}"
                raise type(error)(
                    message, hint=error.hint, place=error.place, path=error.path
                ) from error
        return opened[name]

    return {name: open_one(name) for name in names}


def score(
    rewards: Mapping[str, Scorer], completions: Sequence[str], rows: Sequence[Row]
) -> dict[str, list[ScoredCompletion]]:
    """Every reward of every completion; `rows` go with the completions.  Raises BadData as the rewards do.

    What is both a reward and a part of another is asked once.
    """
    pairs = list(zip(completions, rows, strict=True))
    known: dict[int, list[ScoredCompletion]] = {}

    def judged(name: str, scorer: Scorer) -> list[ScoredCompletion]:
        if id(scorer) not in known:
            if isinstance(scorer, WeightedSum):
                parts = {name: judged(name, part) for name, (_, part) in scorer.parts.items()}
                found = scorer.combine(parts)
            else:
                with blaming("rewards", name):
                    found = scorer.score_all(pairs)
            known[id(scorer)] = found
        return known[id(scorer)]

    return {name: judged(name, scorer) for name, scorer in rewards.items()}


def reward_values(judged: RewardScores) -> dict[str, list[float]]:
    """The numbers alone, those of a sum's parts as SUM/PART."""
    found: dict[str, list[float]] = {}
    for name, values in judged.items():
        found[name] = [j.reward for j in values]
        for part in values[0].parts if values else ():
            found[f"{name}/{part}"] = [j.parts[part] for j in values]
    return found


# ── weighted sums ─────────────────────────────────────────────────────────────────────────────


@frozen(eq=False)
class WeightedSum(Scorer):
    """A weighted sum of other scorers."""

    parts: Mapping[str, tuple[float, Scorer]]

    def combine(self, judged: RewardScores) -> list[ScoredCompletion]:
        """The sums, from what each part gave; the texts of the parts follow each other."""
        return [
            self._one({name: values[i] for name, values in judged.items()})
            for i in range(_length(judged))
        ]

    def _one(self, judged: Mapping[str, ScoredCompletion]) -> ScoredCompletion:
        texts = [j.feedback for j in judged.values() if j.feedback]
        return ScoredCompletion(
            reward=sum(weight * judged[name].reward for name, (weight, _) in self.parts.items()),
            feedback="\n\n".join(texts) or None,
            parts={name: j.reward for name, j in judged.items()},
        )


def _length(judged: RewardScores) -> int:
    return len(next(iter(judged.values())))


def _sum(parts: Mapping[str, tuple[float, Scorer]]) -> WeightedSum:
    def many(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        found = score({"": total}, [text for text, _ in pairs], [row for _, row in pairs])
        return found[""]

    def check(row: Row) -> None:
        for _, part in parts.values():
            part.check_row(row)

    total = WeightedSum(many, parts, check_row=check)
    return total
