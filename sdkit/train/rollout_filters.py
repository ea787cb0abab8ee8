"""Filters for the rollouts to train on (`rollout.keep`), applied once rewards and advantages are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from sdkit.batches import Rollout, RolloutBatch
from sdkit.language.specs import Keep, NonConstantGroup, NonEmpty, RewardAtLeast

Decode = Callable[[Sequence[int]], str]
"""Decodes token ids to text, without special tokens."""


def filter_rollouts(
    filters: Sequence[Keep], batch: RolloutBatch, decode: Decode
) -> tuple[RolloutBatch, dict[str, float]]:
    """Return the rollouts that pass every filter, and the share of rollouts that passes each filter.

    Trajectories that ended by an error of their environment, or before the student took over, pass none and are not counted.

    Group statistics (advantages, siblings, pass rates) still cover every sampled rollout.
    """
    batch = RolloutBatch(rollouts=tuple(r for r in batch if r.ending != "environment_error" and r.is_by_student))
    passes = [[_passes(rollout_filter, r, decode) for r in batch] for rollout_filter in filters]
    rollouts = tuple(r for i, r in enumerate(batch) if all(column[i] for column in passes))
    shares = {
        rollout_filter.kind: sum(column) / max(len(column), 1)
        for rollout_filter, column in zip(filters, passes, strict=True)
    }
    return RolloutBatch(rollouts=rollouts), shares


def _passes(rollout_filter: Keep, rollout: Rollout, decode: Decode) -> bool:
    match rollout_filter:
        case NonEmpty():
            return bool(decode(rollout.sampled_ids).strip())
        case RewardAtLeast(threshold=threshold):
            return rollout.reward is not None and rollout.reward >= threshold
        case NonConstantGroup():
            return len(set(rollout.group_rewards)) > 1
        case _:
            assert_never(rollout_filter)
