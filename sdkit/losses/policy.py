"""What belongs to a sampled token: importance ratios and estimates of the reverse KL from one draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp (Hübotter 2026, core_algos.py)."""


def importance_ratio(now: Tensor, then: Tensor, cap: float) -> Tensor:
    """exp(now − then), at most `cap`; no gradient.  Log-probabilities [...], [...] -> [...].

    Hübotter 2026 (to the old policy, and to the sampler per token); Shenfeld 2026 (to the sampler).
    """
    log_ratio = (now - then).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def cap_binds(now: Tensor, then: Tensor, cap: float) -> Tensor:
    """Where `importance_ratio` was cut by its cap.  Log-probabilities [...], [...] -> [...] bool."""
    return (now - then).detach() > math.log(cap)


def sequence_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean over each sequence's tokens, handed back to every token.  [M], row [M] long -> [M]."""
    sums = values.new_zeros(rows).index_add(0, row, values)
    sizes = values.new_zeros(rows).index_add(0, row, torch.ones_like(values))
    return (sums / sizes.clamp(min=1))[row]


def sampled_token_surrogate(student: Tensor, teacher: Tensor) -> Tensor:
    """sg(log S_y − log T_y) · log S_y for y ~ S.  Log-probabilities of y [...], [...] -> [...].

    Its expected gradient is that of KL(S‖T) at fixed prefixes; its value is not the KL (report `k1` for that).
    Lu 2025 (Thinking Machines), as in reference/methods.md §5.4.
    """
    return (student - teacher).detach() * student


def k1(student: Tensor, teacher: Tensor) -> Tensor:
    """log S_y − log T_y: the unbiased value of KL(S‖T) for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    Never differentiate it: E[∇k1] = E[∇log S] = 0, the teacher drops out.
    """
    return student - teacher.detach()


def k2(student: Tensor, teacher: Tensor) -> Tensor:
    """½ (log S_y − log T_y)²: a biased value of KL(S‖T) for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    E[∇k2] = ∇KL(S‖T): the right gradient, the same as the surrogate's.
    """
    return 0.5 * (student - teacher.detach()).square()


def k3(student: Tensor, teacher: Tensor) -> Tensor:
    """T_y/S_y − 1 − log(T_y/S_y): unbiased and never negative for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    E[∇k3] = ∇KL(T‖S): differentiated, it pulls by the *forward* KL.
    """
    log_ratio = teacher.detach() - student
    return torch.expm1(log_ratio) - log_ratio
