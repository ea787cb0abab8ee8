"""The support of a divergence: the vocabulary tokens it covers, and the remainder rule for all others.

Takes log-probabilities over the vocabulary `[..., V]`, returns log-probabilities over a support `[..., K]`.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

Remainder = Literal["tail_bucket", "renormalize", "renormalize_teacher", "drop"]

SMALLEST_TAIL = 1e-7
"""Probability below which float32 cannot distinguish 1 − Σ from 0."""


def sampled_token(logprobs: Tensor, token: Tensor) -> Tensor:
    """Returns the log-probability of one token per position.  [..., V], [...] long -> [...]."""
    return logprobs.gather(-1, token[..., None]).squeeze(-1)


def top_k_ids(logprobs: Tensor, k: int) -> Tensor:
    """Returns the k likeliest ids, likeliest first.  [..., V] -> [..., k] long.  Raises ValueError if k > V."""
    if k > logprobs.shape[-1]:
        raise ValueError(f"top {k} of a vocabulary of {logprobs.shape[-1]} tokens")
    return logprobs.detach().topk(k, dim=-1).indices


def union_ids(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both sets in ascending order, and which entries repeat the previous one.

    [..., k] long, [..., k] long -> ids [..., 2k] long, duplicate [..., 2k] bool.
    """
    ids = torch.cat([first, second], dim=-1).sort(dim=-1).values
    repeats = ids[..., 1:] == ids[..., :-1]
    return ids, torch.cat([torch.zeros_like(repeats[..., :1]), repeats], dim=-1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Returns the share of one set of ids that is also in the other.  [..., k] long, [..., k] long -> [...] float32."""
    return union_ids(first, second)[1].sum(-1) / first.shape[-1]


def mass(logprobs: Tensor, ids: Tensor, duplicate: Tensor) -> Tensor:
    """Returns the probability of the support.  [..., V], [..., K] long, [..., K] bool -> [...]."""
    return _gather(logprobs, ids, duplicate).exp().sum(-1)


def tail_bucket(logprobs: Tensor) -> Tensor:
    """Appends log(1 − Σ exp(logprobs)), at least log(1e-7).  [..., K] -> [..., K + 1].

    This is coarse graining: a divergence over the result is a lower bound of the full one.  Hübotter 2026 (code).
    """
    tail = torch.log(-torch.expm1(_log_mass(logprobs).clamp(max=-SMALLEST_TAIL)))
    return torch.cat([logprobs, tail], dim=-1)


def renormalize(logprobs: Tensor) -> Tensor:
    """Rescales the support to probability 1.  [..., K] -> [..., K].  arXiv 2603.25562."""
    return logprobs - _log_mass(logprobs)


def on_support(
    student: Tensor, teacher: Tensor, ids: Tensor, duplicate: Tensor, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """Restricts both sides to the same ids and applies the remainder rule.

    [..., V], [..., V], [..., K] long, [..., K] bool -> twice [..., K], or [..., K + 1] with a tail bucket.
    Duplicates become -inf on both sides: no value, no gradient.  `renormalize_teacher` leaves the student
    unchanged (arXiv 2603.07079; the minimum is −log ΣS, not 0); `drop` leaves both unchanged and may be negative.
    """
    return _with_remainder(_gather(student, ids, duplicate), _gather(teacher, ids, duplicate), remainder)


def on_served_top_k(student: Tensor, teacher: Tensor, ids: Tensor, remainder: Remainder) -> tuple[Tensor, Tensor]:
    """`on_support` for a teacher known only on the ids.  [..., V], [..., K], [..., K] long -> as `on_support`.

    If the remainder rule rescales `teacher`, it may be off by a constant per position.  An id whose teacher entry is
    -inf is padding and is left out on both sides.
    """
    return _with_remainder(_gather(student, ids, teacher == -torch.inf), teacher, remainder)


def _with_remainder(student: Tensor, teacher: Tensor, remainder: Remainder) -> tuple[Tensor, Tensor]:
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


def _gather(logprobs: Tensor, ids: Tensor, duplicate: Tensor) -> Tensor:
    """Log-probabilities of the ids; -inf at duplicates.  -> [..., K]."""
    return logprobs.gather(-1, ids).masked_fill(duplicate, -torch.inf)


def _log_mass(logprobs: Tensor) -> Tensor:
    """logsumexp with a finite gradient where every entry is -inf.  [..., K] -> [..., 1]."""
    top = logprobs.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = (logprobs - top).exp().sum(-1, keepdim=True)  # at least 1, except for such rows
    return total.clamp(min=torch.finfo(logprobs.dtype).tiny).log() + top
