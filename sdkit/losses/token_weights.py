"""Token selection by rank and token weights: detached, at least 0, computed before the first update.

M is the number of tokens of one term, in sequence order; `row` [M] long is the sequence of each token; N is the number
of sequences.  No result is NaN: an empty batch gives empty weights, and each docstring says what a zero sum gives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkit.losses.policy import sequence_mean

ROUNDING = 1e-9
"""0.1 × 30 is slightly above 3 in floating point, and still means three tokens."""

AGREEMENT = 1e-6
"""Added to both sides of the ratio of `step_agreement`."""


def top_share(values: Tensor, share: float) -> Tensor:
    """Marks the ⌈share · M⌉ largest values; earlier positions win ties.  [M] -> [M] bool.

    Wang 2025 (arXiv 2506.01939) keeps the tokens of highest entropy, at 0.2.
    """
    count = math.ceil(share * values.numel() - ROUNDING)
    order = values.sort(descending=True, stable=True).indices
    selected = torch.zeros_like(values, dtype=torch.bool)
    selected[order[:count]] = True
    return selected


def sigmoid_ramp(position: Tensor, smallest: float, middle: float, width: float) -> Tensor:
    """smallest + (1 − smallest) · sigmoid((position − middle) / width), position in (0, 1].  [M] -> [M].  arXiv 2605.21606."""
    return smallest + (1 - smallest) * torch.sigmoid((position - middle) / width)


def entropy_weight(entropy: Tensor, rate: float) -> Tensor:
    """exp(−rate · entropy), divided by the mean over all M.  [M] -> [M].  arXiv 2604.02288."""
    if not entropy.numel():
        return torch.zeros_like(entropy)
    # The largest is 1, so the mean is never 0.
    weights = torch.exp(-rate * (entropy - entropy.min()))
    return weights / weights.mean()


def drift(gap: Tensor, row: Tensor, rows: int, strength: float) -> Tensor:
    """1 + strength · (1 − Σ_{j<t} |gap_j| / Σ_j |gap_j|) within each sequence.  [M], row [M] long ascending -> [M].

    If every gap of a sequence is 0, its weights are 1 + strength.  arXiv 2606.22600.
    """
    size = gap.abs()
    totals = gap.new_zeros(rows).index_add(0, row, size)
    before = size.cumsum(0) - size
    earlier_rows = (totals.cumsum(0) - totals)[row]
    share = (before - earlier_rows) / totals[row].masked_fill(totals[row] == 0, 1.0)
    return 1 + strength * (1 - share.clamp(0, 1))


def step_agreement(gap: Tensor, row: Tensor, turn: Tensor, rows: int, largest: float) -> Tensor:
    """min((d₁ + ε) / (d_k + ε), largest), d_k the mean |gap| in turn k of a sequence, d₁ that of its first turn here.

    [M], row [M] long ascending, turn [M] long ascending within each row -> [M].  arXiv 2605.07725, whose product of
    ratios of neighbouring turns is this one ratio.
    """
    unit = turn_units(row, turn)
    size = sequence_mean(gap.abs(), unit, len(gap))
    first = torch.full((rows,), len(gap), dtype=torch.long).scatter_reduce(0, row, torch.arange(len(gap)), "amin")
    return ((size[first[row]] + AGREEMENT) / (size + AGREEMENT)).clamp(max=largest)


def turn_units(row: Tensor, turn: Tensor) -> Tensor:
    """Numbers the turns of all sequences, in order.  row [M] long ascending, turn [M] long ascending in it -> [M] long."""
    new = (row.diff() != 0) | (turn.diff() != 0)
    return torch.cat([row.new_zeros(min(len(row), 1)), new.cumsum(0)])


def pass_rate_variance(pass_rate: Tensor, power: float) -> Tensor:
    """(p · (1 − p))^power; 0 if all or none of a group succeeded.  [N] -> [N].  arXiv 2603.11178."""
    return (pass_rate * (1 - pass_rate)).clamp(min=0) ** power


def perplexity(logprobs: Tensor, row: Tensor, group: Tensor, power: float) -> Tensor:
    """exp(−mean log-probability)^power of each token's sequence, divided by its mean within the group.

    logprobs [M], row [M] long, group [N] long (any ids) -> [M].  The group's mean is over its sequences with at
    least one of the M tokens, each counted once.  arXiv 2604.10688, whose code has this softmax × count.
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
