"""Which tokens count by rank, and what each weighs: detached numbers of at least 0, known before the first update.

Letters: M tokens of one term, sequence after sequence, `row` [M] long the sequence of each, N sequences.  Nothing here
is NaN: an empty batch gives empty weights, and where a mean would be 0 the weights are 0 or all the same, as said.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkit.losses.policy import sequence_mean

ROUNDING = 1e-9
"""0.1 × 30 is a little above 3 in floating point, and still means three tokens."""


def top_share(values: Tensor, share: float) -> Tensor:
    """The ⌈share · M⌉ largest values; of equal ones those that stand first.  [M] -> [M] bool.

    Wang 2025 (arXiv 2506.01939) keeps the tokens of highest entropy, at 0.2.
    """
    kept = math.ceil(share * values.numel() - ROUNDING)
    order = values.sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order[:kept]] = True
    return chosen


def sigmoid_ramp(place: Tensor, smallest: float, middle: float, width: float) -> Tensor:
    """smallest + (1 − smallest) · sigmoid((place − middle) / width), place in (0, 1].  [M] -> [M].  arXiv 2605.21606."""
    return smallest + (1 - smallest) * torch.sigmoid((place - middle) / width)


def entropy_weight(entropy: Tensor, rate: float) -> Tensor:
    """exp(−rate · entropy), divided by the mean over all M.  [M] -> [M].  arXiv 2604.02288."""
    if not entropy.numel():
        return torch.zeros_like(entropy)
    # The largest is 1, so the mean is never 0.
    weights = torch.exp(-rate * (entropy - entropy.min()))
    return weights / weights.mean()


def drift(gap: Tensor, row: Tensor, rows: int, strength: float) -> Tensor:
    """1 + strength · (1 − Σ_{j<t} |gap_j| / Σ_j |gap_j|) within each sequence.  [M], row [M] long ascending -> [M].

    Where a sequence has no gap at all, nothing stands before any token: 1 + strength.  arXiv 2606.22600.
    """
    size = gap.abs()
    whole = gap.new_zeros(rows).index_add(0, row, size)
    before = size.cumsum(0) - size
    earlier_rows = (whole.cumsum(0) - whole)[row]
    share = (before - earlier_rows) / whole[row].masked_fill(whole[row] == 0, 1.0)
    return 1 + strength * (1 - share.clamp(0, 1))


def pass_rate_variance(pass_rate: Tensor, power: float) -> Tensor:
    """(p · (1 − p))^power; 0 where all or none of a group succeeded.  [N] -> [N].  arXiv 2603.11178."""
    return (pass_rate * (1 - pass_rate)).clamp(min=0) ** power


def perplexity(logprobs: Tensor, row: Tensor, group: Tensor, power: float) -> Tensor:
    """exp(−mean log-probability)^power of each token's sequence, over its mean within the group.

    logprobs [M], row [M] long, group [N] long (any ids) -> [M].  The group's mean is over its sequences that have a
    token among the M, each once.  arXiv 2604.10688, whose code has this softmax × count.
    """
    rows = group.numel()
    log_weight = logprobs.new_zeros(rows)
    log_weight[row] = -power * sequence_mean(logprobs, row, rows)
    present = torch.zeros(rows, dtype=torch.bool)
    present[row] = True
    ids, place = torch.unique(group, return_inverse=True)
    floor = logprobs.new_full((ids.numel(),), -torch.inf)
    largest = floor.scatter_reduce(0, place[present], log_weight[present], "amax")
    weight = torch.where(present, (log_weight - largest[place]).exp(), 0.0)
    sums = logprobs.new_zeros(ids.numel()).index_add(0, place, weight)
    sizes = logprobs.new_zeros(ids.numel()).index_add(0, place, present.to(weight.dtype))
    return (weight * (sizes / sums.clamp(min=1))[place])[row]
