"""Opens rewards and scores completions: text and row in, number and optional feedback out.

Knows nothing of tokens or groups.  `answers` and `math` compare answers, `instruction_checks` checks form and language,
`programs` tests programs, `model` runs reward models, `file` calls user-defined functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import assert_never

from sdkit.batches import Row
from sdkit.language import specs
from sdkit.language.errors import SdkitError, blaming
from sdkit.rewards import answers
from sdkit.rewards.file import function_reward
from sdkit.rewards.instruction_checks import instruction_checks
from sdkit.rewards.math import math_verify
from sdkit.rewards.model import reward_model
from sdkit.rewards.programs import python_tests
from sdkit.rewards.scorer import ScoredCompletion, Scorer

RewardScores = Mapping[str, Sequence[ScoredCompletion]]
"""Each reward's score of each completion."""


def open_reward(
    reward: specs.Reward,
    base: Path,
    source: specs.ReasoningGymSource | None,
    opened: Mapping[str, Scorer] | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> Scorer:
    """Returns the scorer of one reward; a completion without an answer scores 0.

    `base` is the folder that relative paths start from; `source` is the source of the rows if it is reasoning-gym;
    `opened` are the rewards that a weighted sum names; `now` returns the date that chat templates print.  Raises BadData
    if the reward cannot be opened and BadEnvironment if the machine lacks a requirement.  The scorer raises BadData if a
    row lacks the right answer, or if a user-defined function fails, exceeds its time or does not return a finite number.
    """
    match reward:
        case specs.ReasoningGymReward():
            return answers.task_scorer(reward, source)
        case specs.ExactReward():
            return answers.exact(reward)
        case specs.NumberReward():
            return answers.number(reward)
        case specs.ChoiceReward():
            return answers.choice(reward)
        case specs.RegexReward():
            return answers.regex(reward)
        case specs.MathVerifyReward():
            return math_verify(reward)
        case specs.RewardModel():
            return reward_model(reward, base, now)
        case specs.PythonTests():
            return python_tests(reward)
        case specs.FileReward():
            return function_reward(reward, base)
        case specs.EnvironmentReward():
            return FromEnvironment()
        case specs.InstructionChecks():
            return instruction_checks(reward)
        case specs.WeightedReward():
            return WeightedSum({name: (weight, (opened or {})[name]) for name, weight in reward.parts.items()})
        case _:
            assert_never(reward)


def open_rewards(
    rewards: Mapping[str, specs.Reward],
    names: Iterable[str],
    base: Path,
    source: specs.ReasoningGymSource | None,
    now: Callable[[], datetime] = datetime.now,
) -> dict[str, Scorer]:
    """Opens the named rewards of a spec, each once.  Raises as `open_reward` does, naming the reward."""
    opened: dict[str, Scorer] = {}

    def open_one(name: str) -> Scorer:
        if name not in opened:
            reward = rewards[name]
            for part in reward.parts if isinstance(reward, specs.WeightedReward) else ():
                open_one(part)
            try:
                with blaming("rewards", name):
                    opened[name] = open_reward(reward, base, source, opened, now)
            except SdkitError as error:
                message = f"rewards.{name}: {error.message}"
                raise type(error)(message, hint=error.hint, place=error.place, path=error.path) from error
        return opened[name]

    return {name: open_one(name) for name in names}


def score(
    rewards: Mapping[str, Scorer],
    completions: Sequence[str],
    rows: Sequence[Row],
    given: Sequence[float | None] | None = None,
) -> dict[str, list[ScoredCompletion]]:
    """Scores every completion with every reward; `rows` belong to the completions.  Raises BadData as the rewards do.

    `given` are the rewards that an environment gave.  A reward that is also a part of another is computed once.
    """
    pairs = list(zip(completions, rows, strict=True))
    scores: dict[int, list[ScoredCompletion]] = {}

    def scores_of(name: str, scorer: Scorer) -> list[ScoredCompletion]:
        if id(scorer) not in scores:
            if isinstance(scorer, WeightedSum):
                parts = {name: scores_of(name, part) for name, (_, part) in scorer.parts.items()}
                result = scorer.combine(parts)
            elif isinstance(scorer, FromEnvironment) and given is not None:
                result = [ScoredCompletion(reward=reward or 0.0) for reward in given]
            else:
                with blaming("rewards", name):
                    result = scorer.score_all(pairs)
            scores[id(scorer)] = result
        return scores[id(scorer)]

    return {name: scores_of(name, scorer) for name, scorer in rewards.items()}


def reward_values(scores: RewardScores) -> dict[str, list[float]]:
    """Returns the numbers only; the parts of a sum are named SUM/PART."""
    values: dict[str, list[float]] = {}
    for name, scored in scores.items():
        values[name] = [s.reward for s in scored]
        for part in scored[0].parts if scored else ():
            values[f"{name}/{part}"] = [s.parts[part] for s in scored]
    return values


class FromEnvironment(Scorer):
    """Rewards that an environment gives; without one, as when rewards are tried, every completion scores 0."""

    def __init__(self) -> None:
        super().__init__(lambda pairs: [ScoredCompletion(reward=0.0) for _ in pairs])


class WeightedSum(Scorer):
    """A weighted sum of other scorers, by name with their weights."""

    def __init__(self, parts: Mapping[str, tuple[float, Scorer]]) -> None:
        self.parts = parts
        super().__init__(
            lambda pairs: self.combine({name: part.score_all(pairs) for name, (_, part) in parts.items()}),
            lambda row: [part.check_row(row) for _, part in parts.values()],
        )

    def combine(self, scores: RewardScores) -> list[ScoredCompletion]:
        """Returns the sums from the scores of the parts; the feedback of the parts is concatenated."""
        columns = zip(*scores.values(), strict=True)
        return [self._combine_one(dict(zip(scores, column, strict=True))) for column in columns]

    def _combine_one(self, scores: Mapping[str, ScoredCompletion]) -> ScoredCompletion:
        texts = [s.feedback for s in scores.values() if s.feedback]
        return ScoredCompletion(
            reward=sum(weight * scores[name].reward for name, (weight, _) in self.parts.items()),
            feedback="\n\n".join(texts) or None,
            parts={name: s.reward for name, s in scores.items()},
        )
