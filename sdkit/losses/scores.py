"""What a teacher said, as logits over the vocabulary: the one place that tells the members of `TeacherScores` apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from sdkit.batches import (
    BlendedScores,
    HiddenStateScores,
    RoutedScores,
    TeacherScores,
    TopKLogprobs,
)


def select_scores(scores: TeacherScores, at: slice | Tensor) -> Tensor | TopKLogprobs:
    """Logits [C, V] of the tokens at these places of the M, or what was told of some ids."""
    return scores.at(at) if isinstance(scores, TopKLogprobs) else logits(scores, at)


def logits(scores: TeacherScores, at: slice | Tensor) -> Tensor:
    """Logits of the tokens at these places of the M, up to a constant per token.  -> [C, V], no gradient.

    Of the model's dtype where one model answers, else float32 (float64 for float64).  Raises ValueError where only some
    ids were told of.
    """
    match scores:
        case HiddenStateScores(hidden=hidden, head=head, transform=transform):
            return transform(hidden[at] @ head.T)
        case RoutedScores(parts=parts, part=part, place=place, vocabulary=vocabulary):
            which, where = part[at], place[at]
            answers = [widen(logits(each, where[which == i])) for i, each in enumerate(parts)]
            joined = answers[0].new_empty(len(which), vocabulary)
            for i, answer in enumerate(answers):
                joined[which == i] = answer
            return joined
        case TopKLogprobs():
            raise ValueError("a teacher that tells of a few ids has no logits of the vocabulary")
        case BlendedScores(parts=parts, factors=factors):
            return _summed([widen(logits(part, at)) for part in parts], factors)
        case _:
            assert_never(scores)


def _summed(parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Σ factor · part.  [C, V] each -> [C, V].

    A token that one part rules out (-inf) stays ruled out whatever the factors: there is no inf − inf.
    """
    total = torch.zeros_like(parts[0])
    ruled_out = torch.zeros_like(total, dtype=torch.bool)
    for part, factor in zip(parts, factors, strict=True):
        total.add_(part, alpha=factor)
        ruled_out |= part == -torch.inf
    return total.masked_fill_(ruled_out, -torch.inf)


def widen(values: Tensor) -> Tensor:
    """float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
