"""Completions → rewards, and what a group's rollouts know of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from sdkit.batches import Attempt, Evidence, RolloutBatch
from sdkit.components.rewards import Judged
from sdkit.engine.counting import Everywhere
from sdkit.losses.policy_terms import group_relative, reward_advantages
from sdkit.specs import LossTerm


def evidence(
    judged: Sequence[Judged] | None, texts: Sequence[str], size: int, seeds: Sequence[int]
) -> list[Evidence | None]:
    """What is known of each rollout, groups of `size` standing together; None where training uses no reward."""
    if judged is None:
        return [None] * len(texts)
    attempts = [
        Attempt(text=text, reward=j.reward, feedback=j.feedback)
        for text, j in zip(texts, judged, strict=True)
    ]
    groups = [attempts[i - i % size : i - i % size + size] for i in range(len(attempts))]
    return [Evidence(group=group, own=i % size, seed=seeds[i]) for i, group in enumerate(groups)]


def with_advantages(
    losses: Mapping[str, LossTerm], batch: RolloutBatch, everywhere: Everywhere
) -> RolloutBatch:
    """The rollouts with their reward against their group, where a term asks for it; a batch's spread is all ranks'."""
    rewards = [r.reward for r in batch if r.reward is not None]
    if group_relative(losses) is None or len(rewards) != len(batch):
        return batch
    groups = torch.tensor([r.group for r in batch], dtype=torch.long)
    all_rewards, own = everywhere(torch.tensor(rewards, dtype=torch.float32))
    all_groups, _ = everywhere(groups)
    found = reward_advantages(losses, all_rewards, all_groups)
    assert found is not None
    pairs = zip(batch, found[own].tolist(), strict=True)
    return RolloutBatch(rollouts=tuple(evolve(r, advantage=a) for r, a in pairs))
