"""How far apart two distributions are: log-probabilities `[..., K]` in, one number per position `[...]` out.

Entries may be -inf (0 · log 0 = 0) and need not sum to one.  The teacher is a constant: no gradient reaches it.
An entry that only the weighted side has makes the divergence inf, as it should.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher‖student) = Σ T (log T − log S).  [..., K], [..., K] -> [...] of the same float dtype.

    Gradient in the student's logits, full vocabulary: S − T.  Shenfeld 2026 (code); Agarwal 2023.
    """
    return _kl(teacher.detach(), student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student‖teacher) = Σ S (log S − log T).  [..., K], [..., K] -> [...] of the same float dtype.

    Gradient in logit v, full vocabulary: S_v [(log S_v − log T_v) − KL].  Hübotter 2026, Eq. 1; Gu 2023.
    """
    return _kl(student, teacher.detach())


def jsd(student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """(1−s) KL(S‖M) + s KL(T‖M) with M = (1−s) S + s T, s = teacher_share.  [..., K], [..., K] -> [...].

    Goes to 0 at both ends of s, so small s is a small forward KL, not the forward KL.  Agarwal 2023.
    Raises ValueError unless 0 < teacher_share < 1.
    """
    teacher = teacher.detach()
    # logaddexp(-inf, -inf) has a NaN gradient; such entries weigh nothing below.
    absent = (student == -torch.inf) & (teacher == -torch.inf)
    mixture = torch.logaddexp(
        student + math.log(1 - teacher_share),
        teacher.masked_fill(absent, 0.0) + math.log(teacher_share),
    )
    return (1 - teacher_share) * _kl(student, mixture) + teacher_share * _kl(teacher, mixture)


def linear_mix(student: Tensor, teacher: Tensor, forward_share: float) -> Tensor:
    """forward_share · forward KL + (1 − forward_share) · reverse KL.  [..., K], [..., K] -> [...].

    NeMo-RL's "mixed" (reference/methods.md §5.1).  At 0 and 1 the other divergence is not computed: it may be inf.
    """
    if forward_share == 0:
        return reverse_kl(student, teacher)
    if forward_share == 1:
        return forward_kl(student, teacher)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    return forward_share * forward + (1 - forward_share) * reverse


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ p log p in nats.  [..., K] -> [...]."""
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Σ p (log p − log q), p = exp(first), q = exp(second), over the entries with p > 0.  [..., K] -> [...].

    The others are replaced before the arithmetic: hiding a NaN afterwards would leave it in the gradient.
    """
    absent = first.detach().exp() == 0
    first, second = first.masked_fill(absent, 0.0), second.masked_fill(absent, 0.0)
    return (first.exp() * (first - second)).sum(-1)
