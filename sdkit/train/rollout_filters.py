"""Which rollouts are trained on: the filters of `rollout.keep`, after rewards and advantages are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from sdkit.batches import Rollout, RolloutBatch
from sdkit.language.specs import Keep, NonConstantGroup, NonEmpty, RewardAtLeast

Text = Callable[[Sequence[int]], str]
"""Token ids as text, without special tokens."""


def filter_rollouts(
    keep: Sequence[Keep], batch: RolloutBatch, text: Text
) -> tuple[RolloutBatch, dict[str, float]]:
    """The rollouts that pass every filter, and the share that passes each one.

    A group's statistics (advantages, siblings, pass rates) are those of all that were sampled.
    """
    passed = [[_passes(each, r, text) for r in batch] for each in keep]
    whole = (
        [all(verdicts) for verdicts in zip(*passed, strict=True)] if keep else [True] * len(batch)
    )
    rollouts = tuple(r for r, every in zip(batch, whole, strict=True) if every)
    shares = {each.kind: sum(p) / max(len(p), 1) for each, p in zip(keep, passed, strict=True)}
    return RolloutBatch(rollouts=rollouts), shares


def _passes(keep: Keep, rollout: Rollout, text: Text) -> bool:
    match keep:
        case NonEmpty():
            return bool(text(rollout.completion_ids).strip())
        case RewardAtLeast(threshold=threshold):
            return rollout.reward is not None and rollout.reward >= threshold
        case NonConstantGroup():
            return len(set(rollout.group_rewards)) > 1
        case _:
            assert_never(keep)
