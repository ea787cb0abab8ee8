"""Probes of a newly loaded model: a short sequence, and a check that the model draws no random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.batches import PaddedSequences
from sdkit.language.errors import BadData
from sdkit.models.packing import pad_sequences
from sdkit.models.weights import Weights

PROBE_TOKENS = 24
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""By dtype: the largest relative difference of states that rounding alone can explain."""


def probe_sequence(weights: Weights, device: torch.device) -> PaddedSequences:
    """Returns one sequence of ids spread over the vocabulary; every state but the last is wanted."""
    ids = tuple(torch.linspace(1, weights.head_shape[0] - 1, PROBE_TOKENS).long().tolist())
    return pad_sequences([ids[:1]], [ids[1:]], [range(PROBE_TOKENS - 1)], 0, device)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Returns the median relative difference of two lists of vectors.  [M, H], [M, H] -> float; inf if not finite."""
    differences = (one - other).float().norm(dim=-1) / one.float().norm(dim=-1).clamp(min=1e-30)
    return differences.nan_to_num(float("inf")).median().item()


@torch.no_grad()
def check_deterministic(weights: Weights, who: str, device: torch.device) -> None:
    """Raise BadData if two forward passes over the same tokens differ by more than rounding."""
    sequence = probe_sequence(weights, device)
    one, other = weights.hidden(sequence), weights.hidden(sequence)
    if one.isfinite().all() and relative_difference(one, other) >= ROUNDING[one.dtype]:
        raise BadData(
            f"the {who} returns different states for the same tokens: it draws random numbers in eval mode",
            hint="turn off its dropout or noise in its config.json",
            path=("teacher", "weights") if weights.foreign else ("model", "path"),
        )
