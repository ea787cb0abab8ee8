"""A short sequence through a model that was just opened, and a check that the model draws no random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.batches import PaddedSequences
from sdkit.language.errors import BadData
from sdkit.models.packing import pad_sequences
from sdkit.models.weights import Weights

LENGTH = 24
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""By dtype: the largest relative difference of states that rounding alone explains."""


def probe(weights: Weights, device: torch.device) -> PaddedSequences:
    """One sequence of ids from all over the vocabulary, every state but the last wanted."""
    ids = tuple(torch.linspace(1, weights.head.shape[0] - 1, LENGTH).long().tolist())
    return pad_sequences([ids[:1]], [ids[1:]], [range(LENGTH - 1)], 0, device)


def apart(one: Tensor, other: Tensor) -> float:
    """The relative difference of two lists of vectors, the median over them.  [M, H], [M, H]; inf where not finite."""
    differences = (one - other).float().norm(dim=-1) / one.float().norm(dim=-1).clamp(min=1e-30)
    return differences.nan_to_num(float("inf")).median().item()


@torch.no_grad()
def check_deterministic(weights: Weights, who: str, device: torch.device) -> None:
    """Raise BadData where two forward passes over the same tokens differ by more than rounding."""
    sequence = probe(weights, device)
    one, other = weights.hidden(sequence), weights.hidden(sequence)
    if one.isfinite().all() and apart(one, other) >= ROUNDING[one.dtype]:
        raise BadData(
            f"the {who} gives other states for the same tokens: it draws random numbers in eval mode",
            hint="turn its dropout or noise off in its config.json",
            path=("teacher", "weights") if weights.foreign else ("model", "path"),
        )
