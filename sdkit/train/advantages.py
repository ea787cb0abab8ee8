"""Completions → rewards, and what a group's rollouts know of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from sdkit.batches import Attempt, GroupOutcome, RolloutBatch
from sdkit.language.schedules import plain
from sdkit.language.specs import LossSpec
from sdkit.losses.policy import overlong_share
from sdkit.losses.policy_terms import group_relative, reward_advantages
from sdkit.rewards.scoring import ScoredCompletion
from sdkit.train.loss_masks import AllGather


def group_outcomes(
    judged: Sequence[ScoredCompletion] | None,
    texts: Sequence[str],
    answers: Sequence[str | None],
    size: int,
    seeds: Sequence[int],
) -> list[GroupOutcome | None]:
    """What is known of each rollout, groups of `size` standing together; None where training uses no reward.

    `answers` are the texts without thinking, None where no one asks for them.
    """
    if judged is None:
        return [None] * len(texts)
    attempts = [
        Attempt(text=text, reward=j.reward, feedback=j.feedback, answer=answer)
        for text, answer, j in zip(texts, answers, judged, strict=True)
    ]
    groups = [attempts[i - i % size : i - i % size + size] for i in range(len(attempts))]
    return [
        GroupOutcome(group=group, own=i % size, seed=seeds[i]) for i, group in enumerate(groups)
    ]


def with_advantages(
    losses: Mapping[str, LossSpec], batch: RolloutBatch, everywhere: AllGather, longest: int
) -> RolloutBatch:
    """The rollouts with their reward against their group, where a term asks for it; a batch's spread is all ranks'.

    `longest` is the longest completion that could be, in tokens.
    """
    known = [r.reward for r in batch if r.reward is not None]
    spec = group_relative(losses)
    if spec is None or len(known) != len(batch):
        return batch
    rewards = torch.tensor(known, dtype=torch.float32)
    if penalty := spec.overlong:
        lengths = torch.tensor([len(r.completion_ids) for r in batch], dtype=torch.long)
        rewards -= plain(penalty.amount) * overlong_share(lengths, longest, penalty.stretch)
    groups = torch.tensor([r.group for r in batch], dtype=torch.long)
    all_rewards, own = everywhere(rewards)
    all_groups, _ = everywhere(groups)
    found = reward_advantages(losses, all_rewards, all_groups)
    assert found is not None
    pairs = zip(batch, found[own].tolist(), strict=True)
    return RolloutBatch(rollouts=tuple(evolve(r, advantage=a) for r, a in pairs))
