"""Teacher scores as logits over the vocabulary: the only place that matches on the members of `TeacherScores`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from sdkit.batches import BlendedScores, HiddenStateScores, RoutedScores, TeacherScores, TopKLogprobs


def select_scores(scores: TeacherScores, at: slice | Tensor, buffer: Tensor | None = None) -> Tensor | TopKLogprobs:
    """Returns the logits [C, V] of the selected tokens, in `buffer` as `logits`, or their top-k log-probabilities."""
    return scores.at(at) if isinstance(scores, TopKLogprobs) else logits(scores, at, buffer)


def sampled_logprobs(scores: TopKLogprobs, temperature: float) -> Tensor:
    """Returns the log-probabilities of the sampled tokens, [M].  Raises ValueError for a temperature other than 1."""
    if temperature != 1:
        raise ValueError(f"the teacher's log-probabilities are at temperature 1, not {temperature:g}")
    return scores.sampled


def logits(scores: TeacherScores, at: slice | Tensor, buffer: Tensor | None = None) -> Tensor:
    """Returns the logits of the selected tokens, up to a constant per token.  -> [C, V], no gradient.

    They have the model's dtype if there is one model, else float32 (float64 for float64).  buffer [≥ C, V]: memory that one
    model's products may overwrite.  Raises ValueError for `TopKLogprobs`.
    """
    match scores:
        case HiddenStateScores(hidden=hidden, head=head, transform=transform):
            states = hidden[at]
            return transform(torch.mm(states, head.T, out=None if buffer is None else buffer[: len(states)]))
        case RoutedScores(parts=parts, part=part, place=place, vocabulary=vocabulary):
            routes, places = part[at], place[at]
            routed = [widen(logits(p, places[routes == i])) for i, p in enumerate(parts)]
            joined = routed[0].new_empty(len(routes), vocabulary)
            for i, rows in enumerate(routed):
                joined[routes == i] = rows
            return joined
        case TopKLogprobs():
            raise ValueError("a top-k teacher has no logits over the vocabulary")
        case BlendedScores(parts=parts, factors=factors):
            return weighted_sum([widen(logits(part, at)) for part in parts], factors)
        case _:
            assert_never(scores)


def weighted_sum(parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Σ factor · part.  [C, V] each -> [C, V].

    A token that any part excludes (-inf) stays excluded whatever the factors, so inf − inf never occurs.
    """
    total = torch.zeros_like(parts[0])
    ruled_out = torch.zeros_like(total, dtype=torch.bool)
    for part, factor in zip(parts, factors, strict=True):
        total.add_(part, alpha=factor)
        ruled_out |= part == -torch.inf
    return total.masked_fill_(ruled_out, -torch.inf)


def widen(values: Tensor) -> Tensor:
    """Converts to float32, unless the dtype is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
