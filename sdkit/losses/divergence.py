"""Divergences between two distributions: log-probabilities `[..., K]` in, one number per position `[...]` out.

Entries may be -inf (0 · log 0 = 0), and their probabilities need not sum to 1.  The teacher is a constant: it gets no
gradient.  If an entry is possible only under the weighting distribution, the divergence is inf, as it should be.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor


@frozen(kw_only=True)
class Bounds:
    """Bounds on the entries of a KL: log S − log T is clamped to [low, high], then each entry to at most `entry`.

    low < 0 < high, so that an entry without probability stays 0.
    """

    low: float = -math.inf
    high: float = math.inf
    entry: float = math.inf


UNBOUNDED = Bounds()

SMALLEST_LOGPROB = -87.0
"""exp of anything above is a normal float32."""


def forward_kl(
    student: Tensor, teacher: Tensor, bounds: Bounds = UNBOUNDED, *, probabilities: Tensor | None = None
) -> Tensor:
    """KL(teacher‖student) = Σ T (log T − log S).  [..., K], [..., K] -> [...] of the same float dtype.

    Gradient in the student's logits, full vocabulary: S − T.  Shenfeld 2026 (code); Agarwal 2023.  Entries bounded at
    τ = 0.05: Zhao 2026 (OPSD code); the sum may then be negative.  An entry at its bound has no gradient.
    `probabilities`: exp(teacher), if it is at hand.
    """
    mirrored = Bounds(low=-bounds.high, high=-bounds.low, entry=bounds.entry)
    return _kl(teacher.detach(), student, mirrored, probabilities)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    bounds: Bounds = UNBOUNDED,
    *,
    detach_weights: bool = False,
    probabilities: Tensor | None = None,
) -> Tensor:
    """KL(student‖teacher) = Σ S (log S − log T).  [..., K], [..., K] -> [...] of the same float dtype.

    Gradient in logit v, full vocabulary: S_v [(log S_v − log T_v) − KL].  Hübotter 2026, Eq. 1; Gu 2023.
    With `detach_weights` the value is the same and the gradient is Σ S (log S − log T) ∇log S.  Over the full vocabulary
    that is the same gradient; over part of it, it lacks the spurious + 1 (arXiv 2605.11182).
    `probabilities`: exp(student) with its gradient, if it is at hand.
    """
    if not detach_weights:
        return _kl(student, teacher.detach(), bounds, probabilities)
    now = _without_absent(student, student)[0]
    entries = _entries(student.detach(), teacher.detach(), bounds)
    return (entries * (now - now.detach())).sum(-1) + entries.sum(-1)


def jsd(student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """(1−s) KL(S‖M) + s KL(T‖M) with M = (1−s) S + s T, s = teacher_share.  [..., K], [..., K] -> [...].

    Tends to 0 at both ends of s: a small s gives a scaled-down forward KL, not the forward KL itself.  Agarwal 2023.
    Raises ValueError unless 0 < teacher_share < 1.
    """
    teacher = teacher.detach()
    mixture = _mixture(student, teacher, teacher_share)
    return (1 - teacher_share) * _kl(student, mixture) + teacher_share * _kl(teacher, mixture)


def skewed_forward_kl(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """KL(T‖s T + (1−s) S), s = share: always finite.  [..., K], [..., K] -> [...].  Ko 2024 (DistiLLM).

    Raises ValueError unless 0 < share < 1.
    """
    return _kl(teacher.detach(), _mixture(student, teacher.detach(), share))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """KL(S‖s S + (1−s) T), s = share: always finite.  [..., K], [..., K] -> [...].  Ko 2024 (DistiLLM).

    Raises ValueError unless 0 < share < 1.
    """
    return _kl(student, _mixture(student, teacher.detach(), 1 - share))


def linear_mix(student: Tensor, teacher: Tensor, forward_share: float) -> Tensor:
    """forward_share · forward KL + (1 − forward_share) · reverse KL.  [..., K], [..., K] -> [...].

    NeMo-RL's "mixed".  At 0 and 1 the other divergence is not computed, because it may be inf.
    """
    if forward_share == 0:
        return reverse_kl(student, teacher)
    if forward_share == 1:
        return forward_kl(student, teacher)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    return forward_share * forward + (1 - forward_share) * reverse


def entropy(logprobs: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """−Σ p log p in nats.  [..., K] -> [...].  `probabilities`: exp(logprobs), if it is at hand."""
    present, _ = _without_absent(logprobs, logprobs)
    weights = logprobs.exp() if probabilities is None else probabilities
    return -(weights * present).sum(-1)


def _kl(first: Tensor, second: Tensor, bounds: Bounds = UNBOUNDED, probabilities: Tensor | None = None) -> Tensor:
    """Σ p (log p − log q), p = exp(first), q = exp(second), over the entries with p > 0.  [..., K] -> [...]."""
    return _entries(first, second, bounds, probabilities).sum(-1)


def _entries(first: Tensor, second: Tensor, bounds: Bounds, probabilities: Tensor | None = None) -> Tensor:
    """p (log p − log q) within the bounds, 0 where p is 0.  [..., K] -> [..., K]."""
    present, other = _without_absent(first, second)
    ratio = present - other
    if bounds.low > -math.inf or bounds.high < math.inf:
        ratio = ratio.clamp(bounds.low, bounds.high)
    if probabilities is None or present is not first:
        probabilities = present.exp()
    entries = probabilities * ratio
    if bounds.entry < math.inf:
        entries = entries.clamp(max=bounds.entry)
    return entries


def _without_absent(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with 0 at the entries whose probability under `first` is 0, so that no arithmetic meets 0 · inf.

    Masking a NaN after the arithmetic would leave it in the gradient.  Most chunks have no such entry, and looking for
    one is far cheaper than masking.
    """
    if not first.numel() or first.detach().amin() > SMALLEST_LOGPROB:
        return first, second
    absent = first.detach().exp() == 0
    return first.masked_fill(absent, 0.0), second.masked_fill(absent, 0.0)


def _mixture(student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """log((1−s) S + s T), s = teacher_share; gradients are finite where both sides are −inf.  -> [..., K]."""
    # logaddexp(-inf, -inf) has a NaN gradient; the callers give such entries no weight.
    absent = (student == -torch.inf) & (teacher == -torch.inf)
    return torch.logaddexp(
        student + math.log(1 - teacher_share), teacher.masked_fill(absent, 0.0) + math.log(teacher_share)
    )
