"""Completions → rewards, and what a group's rollouts know of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from sdkit.batches import Attempt, Evidence, RolloutBatch
from sdkit.components.rewards import Judged
from sdkit.losses.policy_terms import reward_advantages
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


def with_advantages(losses: Mapping[str, LossTerm], batch: RolloutBatch) -> RolloutBatch:
    """The rollouts with their reward against their group, where a term asks for it."""
    rewards = [r.reward for r in batch if r.reward is not None]
    if len(rewards) != len(batch):
        return batch
    groups = torch.tensor([r.group for r in batch], dtype=torch.long)
    found = reward_advantages(losses, torch.tensor(rewards, dtype=torch.float32), groups)
    if found is None:
        return batch
    pairs = zip(batch, found.tolist(), strict=True)
    return RolloutBatch(rollouts=tuple(evolve(r, advantage=a) for r, a in pairs))
