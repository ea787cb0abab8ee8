"""Losses of sampled tokens: importance ratios, single-sample KL estimates, advantages and the clipped surrogate."""

from __future__ import annotations

import math
from typing import Literal, assert_never

import torch
from torch import Tensor

Baseline = Literal["group_mean", "none"]
Scale = Literal["none", "group_std", "batch_std"]

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp (Hübotter 2026, code)."""


def importance_ratio(now: Tensor, then: Tensor, cap: float) -> Tensor:
    """Returns exp(now − then), at most `cap`; no gradient.  Log-probabilities [...], [...] -> [...].

    Hübotter 2026 (to the old policy, and to the sampler per token); Shenfeld 2026 (to the sampler).
    """
    log_ratio = (now - then).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def cap_binds(now: Tensor, then: Tensor, cap: float) -> Tensor:
    """Returns where the cap of `importance_ratio` applies.  Log-probabilities [...], [...] -> [...] bool."""
    return (now - then).detach() > math.log(cap)


def sequence_mean(values: Tensor, row: Tensor, rows: int, counts: Tensor | None = None) -> Tensor:
    """Returns to every token the mean over its sequence, or over those of its tokens that `counts` marks.

    [M], row [M] long, [M] bool -> [M].
    """
    if counts is None:
        counts = torch.ones_like(values, dtype=torch.bool)
    sums = values.new_zeros(rows).index_add(0, row, values.masked_fill(~counts, 0.0))
    sizes = values.new_zeros(rows).index_add(0, row, counts.to(values.dtype))
    return (sums / sizes.clamp(min=1))[row]


def discounted_sums(values: Tensor, row: Tensor, counts: Tensor, discount: float) -> Tensor:
    """Σ_k discount^k · value of the k-th counted token from here on in the same sequence; 0 at tokens not counted.

    [M], row [M] long ascending, [M] bool -> [M].  Tokens in between that are not counted are no steps: with two turns,
    the last sampled token of the first precedes the first of the second by one step.
    """
    sums = values.masked_fill(~counts, 0.0)
    # sum[t] = value[t] + factor[t] · sum[t + 1], by doubling the number of tokens that each sum and factor covers.
    ends = torch.cat([row[1:] != row[:-1], row.new_ones(min(len(row), 1), dtype=torch.bool)])
    factors = torch.full_like(values, discount).masked_fill(~counts, 1.0).masked_fill(ends, 0.0)
    reach = 1
    while reach < len(values):
        later_sums, later_factors = torch.zeros_like(sums), torch.zeros_like(factors)
        later_sums[:-reach], later_factors[:-reach] = sums[reach:], factors[reach:]
        # A value of another sequence may be infinite, and 0 × inf is nan.
        sums = sums + (factors * later_sums).masked_fill(factors == 0, 0.0)
        factors = factors * later_factors
        reach *= 2
    return sums.masked_fill(~counts, 0.0)


def sampled_token_surrogate(student: Tensor, teacher: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """sg(log S_y − log T_y) · log S_y for y ~ S.  Log-probabilities of y [...], [...] -> [...].

    Its expected gradient is that of KL(S‖T) at fixed prefixes.  Its value is not the KL; report `k1` for that.
    Lu 2025 (Thinking Machines).  `bounds` clamp the log-ratio; the gradient is then not that of any divergence
    (Hübotter 2026, Table 12, clips it at 5).
    """
    weight = (student - teacher).detach()
    return (weight if bounds is None else weight.clamp(*bounds)) * student


def k1(student: Tensor, teacher: Tensor) -> Tensor:
    """log S_y − log T_y: the unbiased value of KL(S‖T) for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    Never differentiate it: E[∇k1] = E[∇log S] = 0, so the teacher has no influence.
    """
    return student - teacher.detach()


def k2(student: Tensor, teacher: Tensor) -> Tensor:
    """½ (log S_y − log T_y)²: a biased value of KL(S‖T) for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    E[∇k2] = ∇KL(S‖T), the same gradient as that of `sampled_token_surrogate`.
    """
    return 0.5 * (student - teacher.detach()).square()


def k3(student: Tensor, teacher: Tensor) -> Tensor:
    """T_y/S_y − 1 − log(T_y/S_y): unbiased and never negative for y ~ S.  [...], [...] -> [...].  Schulman 2020.

    E[∇k3] = ∇KL(T‖S): differentiating it minimises the *forward* KL.
    """
    log_ratio = teacher.detach() - student
    return torch.expm1(log_ratio) - log_ratio


def group_advantages(rewards: Tensor, group: Tensor, baseline: Baseline, scale: Scale, eps: float) -> Tensor:
    """Returns A = (R − baseline) / (std + eps) of every rollout.  rewards [N], group [N] long -> [N] of rewards' dtype.

    `rewards` are those of all ranks; group ids are arbitrary, a group need not be contiguous, and `batch_std` is over
    the whole batch.  Standard deviations are unbiased.  With `group_mean` or `group_std`, a group without spread (one
    rollout, or equal rewards) gets exactly 0; with `batch_std`, so does a batch without spread.  Shao 2024 with TRL's constants; no scale: Liu 2025 (Dr. GRPO).  methods.md §5.7.
    """
    ids, place = torch.unique(group, return_inverse=True)
    mean, std = _moments(rewards, place, ids.numel())
    match baseline:
        case "group_mean":
            above = (rewards - mean).masked_fill(std == 0, 0.0)
        case "none":
            above = rewards
        case _:
            assert_never(baseline)
    match scale:
        case "none":
            return above
        case "group_std":
            spread = std
        case "batch_std":
            spread = _moments(rewards, torch.zeros_like(place), 1)[1]
        case _:
            assert_never(scale)
    return (above / (spread + eps)).masked_fill(spread == 0, 0.0)


def overlong_share(lengths: Tensor, longest: int, stretch: int) -> Tensor:
    """Returns how far each completion reaches into the last `stretch` of `longest` tokens, 0 … 1.  [N] long -> [N] float32.

    Yu 2025 (arXiv 2503.14476), soft overlong punishment: −1 times this is added to the reward.
    """
    return ((lengths - (longest - stretch)) / stretch).clamp(0.0, 1.0)


def _moments(values: Tensor, place: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each value's group; the latter is exactly 0 for equal values.  [N], [N] -> [N], [N]."""
    mean = sequence_mean(values, place, groups)
    size = torch.bincount(place, minlength=groups)[place]
    variance = sequence_mean((values - mean).square(), place, groups) * size / (size - 1).clamp(1)
    ends = [
        values.new_zeros(groups).scatter_reduce(0, place, values, end, include_self=False)[place]
        for end in ("amin", "amax")
    ]
    # The mean of equal numbers may differ from them in the last digit.
    return mean, variance.sqrt().masked_fill(ends[0] == ends[1], 0.0)


def own_gradient(value: Tensor, now: Tensor) -> Tensor:
    """Returns `value` with the gradient of each token's own log-probability.  [...], [...] -> [...].

    Used for the mean log-ratio of a sequence: Zheng 2025, arXiv 2507.18071 (GSPO).  The true gradient of a mean over |y|
    tokens is Σ_t ∇log S_t / |y| at each of the |y| tokens.  If all tokens share weight and factor, the sum over the
    sequence is the same, and no token needs another's graph, so sequences can be split into chunks.  If factors differ
    within a sequence, each token keeps its own: GSPO-token (Zheng 2025, §4.3).
    """
    return value.detach() + (now - now.detach())


def policy_ratio(log_ratio: Tensor) -> Tensor:
    """Returns ρ = exp(log_ratio), with its gradient.  [...] -> [...]."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, low: float = math.inf, high: float = math.inf, dual: float | None = None
) -> Tensor:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), ρ = exp(log_ratio); for A < 0 at most −dual · A.  [...], [...] -> [...].

    There is no gradient where the clip applies (`clip_binds`); exactly at a bound it does not apply.  Schulman 2017;
    separate bounds: Yu 2025; dual clip: Ye 2020 (arXiv 1912.09729).  The advantages get no gradient.
    """
    advantages, ratio = advantages.detach(), policy_ratio(log_ratio)
    below, above = clip_binds(ratio, advantages, low, high)
    ratio = ratio.masked_fill(below, 1 - low).masked_fill(above, 1 + high)
    if dual is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=dual), ratio)
    return -ratio * advantages


def clip_binds(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Returns where the ratio is clipped at 1 − low (A < 0), and where at 1 + high (A > 0).  [...], [...] -> twice [...] bool."""
    ratio = ratio.detach()
    return (advantages < 0) & (ratio < 1 - low), (advantages > 0) & (ratio > 1 + high)


def scaled_advantages(advantages: Tensor, log_ratio: Tensor, share: float, low: float, high: float) -> Tensor:
    """A [(1 − λ) + λ clip(exp(sign(A) δ), 1 − low, 1 + high)], λ = share, δ = log T − log S.  [...], [...] -> [...].

    A token that the teacher finds likelier than the student gets more credit for a good outcome, less blame for a bad one.
    RLSD, arXiv 2604.03128.
    """
    signed = (advantages.sign() * log_ratio).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    factor = signed.exp().clamp(1 - low, 1 + high)
    return (advantages * ((1 - share) + share * factor)).detach()
