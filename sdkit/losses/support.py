"""Which tokens of the vocabulary a divergence is taken over, and what becomes of the rest.

Log-probabilities over the vocabulary `[..., V]` come in, log-probabilities over a support `[..., K]` go out.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

Remainder = Literal["tail_bucket", "renormalize", "renormalize_teacher", "drop"]

SMALLEST_TAIL = 1e-7
"""Probability below which float32 cannot tell 1 − Σ from 0."""


def sampled_token(logprobs: Tensor, token: Tensor) -> Tensor:
    """Log-probability of one token per position.  [..., V], [...] long -> [...]."""
    return logprobs.gather(-1, token[..., None]).squeeze(-1)


def top_k_ids(logprobs: Tensor, k: int) -> Tensor:
    """The k likeliest ids, likeliest first.  [..., V] -> [..., k] long.  Raises ValueError where k > V."""
    if k > logprobs.shape[-1]:
        raise ValueError(f"top {k} of a vocabulary of {logprobs.shape[-1]} tokens")
    return logprobs.detach().topk(k, dim=-1).indices


def union_ids(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in ascending order, and which entries repeat the one before.

    [..., k] long, [..., k] long -> ids [..., 2k] long, duplicate [..., 2k] bool.
    """
    ids = torch.cat([first, second], dim=-1).sort(dim=-1).values
    repeats = ids[..., 1:] == ids[..., :-1]
    return ids, torch.cat([torch.zeros_like(repeats[..., :1]), repeats], dim=-1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of one set of ids that stands in the other.  [..., k] long, [..., k] long -> [...] float32."""
    return union_ids(first, second)[1].sum(-1) / first.shape[-1]


def mass(logprobs: Tensor, ids: Tensor, duplicate: Tensor) -> Tensor:
    """Probability on the support.  [..., V], [..., K] long, [..., K] bool -> [...]."""
    return _kept(logprobs, ids, duplicate).exp().sum(-1)


def tail_bucket(kept: Tensor) -> Tensor:
    """Appends log(1 − Σ exp(kept)), at least log(1e-7).  [..., K] -> [..., K + 1].

    Coarse graining, so a divergence over it is a lower bound of the full one.  Hübotter 2026 (core_algos.py).
    """
    tail = torch.log(-torch.expm1(_log_mass(kept).clamp(max=-SMALLEST_TAIL)))
    return torch.cat([kept, tail], dim=-1)


def renormalize(kept: Tensor) -> Tensor:
    """Rescales the support to probability one.  [..., K] -> [..., K].  reference/methods.md §5.3."""
    return kept - _log_mass(kept)


def on_support(
    student: Tensor, teacher: Tensor, ids: Tensor, duplicate: Tensor, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """Both sides on the same ids, after the remainder rule.

    [..., V], [..., V], [..., K] long, [..., K] bool -> twice [..., K], or [..., K + 1] with a tail bucket.
    Duplicates become -inf on both sides: no value, no gradient.  `renormalize_teacher` leaves the student as it is
    (arXiv 2603.07079; its minimum is −log ΣS, not 0); `drop` leaves both, and may be negative.
    """
    return _with_remainder(
        _kept(student, ids, duplicate), _kept(teacher, ids, duplicate), remainder
    )


def on_served_top_k(
    student: Tensor, told: Tensor, ids: Tensor, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """`on_support` where the teacher is known on the ids alone.  [..., V], [..., K], [..., K] long -> the same.

    `told` may lack a constant per position where the remainder rescales it.  An id of which -inf was told is none: it is
    left out on both sides.
    """
    return _with_remainder(_kept(student, ids, told == -torch.inf), told, remainder)


def _with_remainder(
    student: Tensor, teacher: Tensor, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """[..., K], [..., K] -> twice [..., K], or [..., K + 1]."""
    match remainder:
        case "tail_bucket":
            return tail_bucket(student), tail_bucket(teacher)
        case "renormalize":
            return renormalize(student), renormalize(teacher)
        case "renormalize_teacher":
            return student, renormalize(teacher)
        case "drop":
            return student, teacher
        case _:
            assert_never(remainder)


def _kept(logprobs: Tensor, ids: Tensor, duplicate: Tensor) -> Tensor:
    """Log-probabilities of the ids, -inf at duplicates.  -> [..., K]."""
    return logprobs.gather(-1, ids).masked_fill(duplicate, -torch.inf)


def _log_mass(kept: Tensor) -> Tensor:
    """logsumexp whose gradient stays finite where every entry is -inf.  [..., K] -> [..., 1]."""
    top = kept.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = (kept - top).exp().sum(-1, keepdim=True)  # at least 1, but for such rows
    return total.clamp(min=torch.finfo(kept.dtype).tiny).log() + top
