"""Averages of token losses, expressed as one weight per row: loss = Σ_j weight[row_j] · ℓ_j.

The weights are computed from the counts of the *global* batch, so the sum over micro-batches and ranks does not depend
on how the rows are distributed.  `lengths` [N] long is the number of counted tokens of each row.  The weight is 0 for a
row without tokens, and for every row if the global count is 0.  Every function: [N] long -> [N] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.batches import Counts


def per_token(lengths: Tensor, counts: Counts) -> Tensor:
    """Σ s_i / Σ n_i.  Yu 2025, arXiv 2503.14476."""
    return _one_over(torch.full_like(lengths, counts.tokens), lengths)


def per_sequence_count(lengths: Tensor, counts: Counts) -> Tensor:
    """mean_i s_i / n_i; a row without tokens counts as 0.  Shao 2024, as TRL computes it."""
    return _one_over(lengths * counts.rows, lengths)


def per_sequence_skip(lengths: Tensor, counts: Counts) -> Tensor:
    """mean_i s_i / n_i over the rows that have tokens.  Shao 2024, as verl computes it."""
    return _one_over(lengths * counts.filled_rows, lengths)


def per_turn(lengths: Tensor, counts: Counts) -> Tensor:
    """Σ_turns s_t / n_t over the number of turns that have tokens.  The weight here is that of a row's whole turns;
    each token's share of its turn, 1 / n_t, is a factor besides (train/collate.py)."""
    return _one_over(torch.full_like(lengths, counts.turns), lengths)


def sequence_sum(lengths: Tensor, counts: Counts) -> Tensor:
    """mean_i s_i over the rows that have tokens.  verl, seq-mean-token-sum."""
    return _one_over(torch.full_like(lengths, counts.filled_rows), lengths)


def constant(lengths: Tensor, counts: Counts, length: float) -> Tensor:
    """Σ s_i / (rows · length); rows without tokens count too.  Liu 2025, arXiv 2503.20783, as TRL computes it."""
    return _one_over(torch.full_like(lengths, counts.rows) * float(length), lengths)


def total(lengths: Tensor) -> Tensor:
    """Σ s_i.  Tinker's `sum`."""
    return _one_over(torch.ones_like(lengths), lengths)


def _one_over(divisor: Tensor, lengths: Tensor) -> Tensor:
    """1 / divisor, or 0 if the row has no tokens or the divisor is 0.  [N], [N] long -> [N] float32."""
    usable = (lengths > 0) & (divisor > 0)
    safe = divisor.to(torch.float32).masked_fill(~usable, 1.0)
    return usable / safe
