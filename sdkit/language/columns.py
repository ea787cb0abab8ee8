"""Which columns of its rows a run reads, and the rewards that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sdkit.language import specs

TextReward = specs.ExactReward | specs.NumberReward | specs.ChoiceReward | specs.MathVerifyReward
"""Rewards that read a column as text."""


def leaf_rewards(rewards: Mapping[str, specs.Reward], name: str) -> Iterator[specs.Reward]:
    """The reward `name`, or the leaves of the weighted sum that it is."""
    reward = rewards[name]
    if not isinstance(reward, specs.WeightedReward):
        yield reward
        return
    for part in reward.parts:
        yield from leaf_rewards(rewards, part)


def training_reward(spec: specs.ExperimentSpec) -> str | None:
    """The name of the reward that training uses: the one that the spec names, or the only one."""
    return spec.reward or (next(iter(spec.rewards)) if len(spec.rewards) == 1 else None)


def training_rewards(spec: specs.ExperimentSpec) -> list[str]:
    """The rewards that can score training rows, whether or not the loss uses them."""
    return [name for name in spec.rewards if scores_training_rows(spec, name)]


def scores_training_rows(spec: specs.ExperimentSpec, name: str) -> bool:
    """Whether the training rows have what the reward `name` reads."""
    reward, data = spec.rewards[name], spec.data
    if isinstance(reward, specs.WeightedReward):
        return all(scores_training_rows(spec, part) for part in reward.parts)
    if isinstance(reward, specs.ReasoningGymReward):
        return isinstance(data.source, specs.ReasoningGymSource)
    return specs.column_of(reward) in (None, *(data.columns or {}))


def suite_rewards(spec: specs.ExperimentSpec, suite: specs.HeldOutPrompts) -> list[str]:
    """The rewards that score a suite's completions."""
    judges = [judge.reward for _, judge in specs.environments_of(spec.environment, specs.RetryEnvironment)]
    return list(dict.fromkeys((suite.score, *suite.also, *filter(None, [training_reward(spec), *judges]))))


def answer_columns(spec: specs.ExperimentSpec, rewards: Iterable[str]) -> set[str]:
    """The columns that these rewards read as text."""
    leaves = (leaf for name in rewards for leaf in leaf_rewards(spec.rewards, name))
    return {leaf.answer for leaf in leaves if isinstance(leaf, TextReward)}


def slot_columns(spec: specs.ExperimentSpec) -> list[str]:
    """The columns that the teacher's context shows, or the question to its writer."""
    return [slot.name for _, slot in spec.placed_slots() if isinstance(slot, specs.ColumnSlot)]


def shown_columns(spec: specs.ExperimentSpec) -> list[str]:
    """The columns of training rows that a model reads or is trained on, besides the prompt."""
    return [*slot_columns(spec), *required_columns(spec)]


def required_columns(spec: specs.ExperimentSpec) -> list[str]:
    """The columns that no training row may leave empty: that of completions or demonstrated turns, if the data has them."""
    return list(filter(None, [spec.rollout.data_column]))


def logs_chats(spec: specs.ExperimentSpec) -> bool:
    """Whether completions of the data set are logged chats of several turns."""
    column = (spec.data.columns or {}).get(spec.rollout.sampled_by.completion_column or "")
    return isinstance(column, specs.ChatTurns)


def text_columns(spec: specs.ExperimentSpec, suite: specs.HeldOutPrompts | None) -> set[str]:
    """The columns that must have text, in a suite's rows or (None) in the training rows."""
    weights = spec.teacher and spec.teacher.weights
    routed = [
        part for part in (weights, spec.environment) if isinstance(part, specs.RoutedWeights | specs.RoutedEnvironment)
    ]
    seeds = [part.seed_column for _, part in specs.environments_of(spec.environment, specs.SteppedEnvironment)]
    tasks = [part.task_column for _, part in specs.environments_of(spec.environment, specs.VerifiersEnvironment)]
    deciding = [*(part.by for part in routed), *filter(None, seeds), *tasks]
    shown = shown_columns(spec) if suite is None else slot_columns(spec)
    rewards = training_rewards(spec) if suite is None else suite_rewards(spec, suite)
    return {*shown, *deciding, *answer_columns(spec, rewards)}
