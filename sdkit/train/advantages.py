"""Group outcomes and reward advantages of scored completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from sdkit.batches import Attempt, GroupOutcome, RolloutBatch
from sdkit.language.specs import LossSpec
from sdkit.losses.policy import overlong_share
from sdkit.losses.policy_terms import group_relative, reward_advantages
from sdkit.rewards.scoring import ScoredCompletion
from sdkit.train.loss_masks import AllGather


def group_outcomes(
    scores: Sequence[ScoredCompletion] | None,
    texts: Sequence[str],
    answers: Sequence[str | None],
    group_size: int,
    seeds: Sequence[int],
) -> list[GroupOutcome | None]:
    """Return the group outcome of each rollout, or None for each if training uses no reward.

    Each run of `group_size` consecutive completions is one group.  `answers` are the texts without thinking, or None
    if nothing needs them.
    """
    if scores is None:
        return [None] * len(texts)
    attempts = [
        Attempt(text=text, reward=score.reward, feedback=score.feedback, answer=answer)
        for text, answer, score in zip(texts, answers, scores, strict=True)
    ]
    starts = [i - i % group_size for i in range(len(attempts))]
    return [
        GroupOutcome(group=attempts[start : start + group_size], own=i - start, seed=seeds[i])
        for i, start in enumerate(starts)
    ]


def with_advantages(
    losses: Mapping[str, LossSpec], batch: RolloutBatch, all_gather: AllGather, max_new_tokens: int
) -> RolloutBatch:
    """Return the rollouts with group-relative advantages, or unchanged if no term uses them or a reward is missing.

    Batch statistics cover all ranks.  `max_new_tokens` is the length limit of a completion; the overlong penalty
    counts back from it.
    """
    own_rewards = [r.reward for r in batch if r.reward is not None]
    spec = group_relative(losses)
    if spec is None or len(own_rewards) != len(batch):
        return batch
    rewards = torch.tensor(own_rewards, dtype=torch.float32)
    if penalty := spec.overlong:
        lengths = torch.tensor([len(r.sampled) for r in batch], dtype=torch.long)
        rewards -= penalty.amount * overlong_share(lengths, max_new_tokens, penalty.stretch)
    groups = torch.tensor([r.group for r in batch], dtype=torch.long)
    all_rewards, own_slice = all_gather(rewards)
    all_groups, _ = all_gather(groups)
    advantages = reward_advantages(losses, all_rewards, all_groups)
    assert advantages is not None
    pairs = zip(batch, advantages[own_slice].tolist(), strict=True)
    return RolloutBatch(rollouts=tuple(evolve(r, advantage=a) for r, a in pairs))
