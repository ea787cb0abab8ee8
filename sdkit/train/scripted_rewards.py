"""Scripted rewards for smoke runs: each rollout batch has rewards on both sides of every threshold of the spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdkit.language.specs import BaseEnvironment, ExperimentSpec, MethodSpec, environments_of
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer

NEVER = 1e6
"""A threshold that no scripted reward reaches."""
PROMPTS = 2
"""Prompts in a batch if the thresholds do not need more."""


def thresholds(spec: MethodSpec) -> list[float]:
    """Every success threshold in the method, ascending; [1.0] if there is none."""
    return sorted(set(_thresholds(spec))) or [1.0]


def _thresholds(spec: MethodSpec) -> Iterator[float]:
    weights = (term.token_weight for term in spec.losses.values())
    environment = spec.environment if isinstance(spec, ExperimentSpec) else None
    slots = (slot for _, slot in spec.placed_slots())
    environments = [part for _, part in environments_of(environment, BaseEnvironment)]
    for part in (spec.route, *environments, *spec.rollout.keep, *slots, *weights):
        threshold = getattr(part, "threshold", None)
        if threshold not in (None, NEVER):
            yield threshold


def group_rewards(spec: MethodSpec) -> list[list[float]]:
    """The rewards of each group of a batch.

    For each threshold one group has a failure below it and a success at the highest; one more group has only successes,
    of two different rewards.
    """
    known, size = thresholds(spec), spec.rollout.completions_per_prompt
    lowest = known[0] - max(1.0, abs(known[0]))
    highest = known[-1] + max(1.0, abs(known[-1]))
    levels = [lowest, *known, highest]
    if size == 1:
        return [[level] for level in levels]
    pairs = [(level, known[-1]) for level in levels[:-2]] + [(known[-1], highest)]
    return [[pair[i % 2] for i in range(size)] for pair in pairs]


def scorer(spec: MethodSpec) -> Scorer:
    """A scorer that rewards completions by position alone and gives feedback on each."""
    script = [reward for group in group_rewards(spec) for reward in group]
    top = thresholds(spec)[-1]

    def judge(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        rewards = [script[place % len(script)] for place in range(len(pairs))]
        return [
            ScoredCompletion(reward=r, feedback="This is right." if r >= top else "This is not right.")
            for r in rewards
        ]

    return Scorer(judge)
