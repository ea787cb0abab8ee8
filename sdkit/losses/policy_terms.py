"""LossSpec terms of sampled tokens: policy gradient, KL to the reference model, and importance corrections.

`objective.py` calls these functions for each chunk; the mathematics is in `policy.py`.  `temperature` is always the
sampling temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from sdkit.batches import Tokens
from sdkit.language.specs import (
    AdvantageAdd,
    AdvantageScale,
    GroupRelative,
    LogRatio,
    LossSpec,
    OldPolicyRatio,
    PolicyGradient,
    ReferenceKl,
    SamplerRatio,
)
from sdkit.losses import policy
from sdkit.losses.distributions import Distributions
from sdkit.losses.divergence import reverse_kl
from sdkit.losses.support import sampled_token

LossMetrics = dict[str, Tensor]
"""Metrics per token, detached: name -> [C]."""


def policy_gradients(losses: Mapping[str, LossSpec]) -> dict[str, PolicyGradient]:
    """Returns the policy-gradient terms, by name."""
    return {name: term for name, term in losses.items() if isinstance(term, PolicyGradient)}


def group_relative(losses: Mapping[str, LossSpec]) -> GroupRelative | None:
    """Returns the spec of `Tokens.advantages`, or None.  Raises ValueError if two terms ask for different ones."""
    terms = policy_gradients(losses).values()
    specs = {part for t in terms if (part := t.advantage.group_relative)}
    if len(specs) > 1:
        raise ValueError("all terms must have the same group_relative advantage")
    return next(iter(specs), None)


def reward_advantages(losses: Mapping[str, LossSpec], rewards: Tensor, group: Tensor) -> Tensor | None:
    """Returns each rollout's advantage, [N]; None if no term needs it.

    rewards [N] float and group [N] long are those of all ranks, before the rollouts are split into updates.
    """
    spec = group_relative(losses)
    if spec is None:
        return None
    return policy.group_advantages(rewards, group, spec.baseline, spec.scale, spec.eps)


def needs_sequence_means(losses: Mapping[str, LossSpec]) -> bool:
    """Whether `Tokens.sequence_means` must be filled before the first chunk."""
    return any(term.ratio != "token" or _spans_sequence(term) for term in policy_gradients(losses).values())


def sequence_means(
    losses: Mapping[str, LossSpec], now: Tensor, teacher: Tensor | None, tokens: Tokens, rows: int
) -> dict[str, Tensor]:
    """Returns the values of `Tokens.sequence_means`, from the tokens of each sequence that a term counts.

    `TERM/log_ratio`: mean of log student now − before this batch over the sequence or the turn (absent without
    `old_logprobs`: the ratio is then 1).  `TERM/advantage`: the teacher's log-ratio, discounted or centered.
    now [M], teacher [M]: log-probabilities of the sampled tokens at the sampling temperature, detached -> [M] each, 0 at
    tokens that the term does not count.
    """
    then = now if tokens.old_logprobs is None else tokens.old_logprobs
    means: dict[str, Tensor] = {}
    for name, term in policy_gradients(losses).items():
        counts = tokens.weights[name] > 0

        if term.ratio != "token" and tokens.old_logprobs is not None:
            unit = (tokens.row, rows)
            if term.ratio == "turn" and tokens.turn is not None:
                unit = (tokens.turn, len(tokens))
            means[f"{name}/log_ratio"] = policy.sequence_mean(now - then, *unit, counts).masked_fill(~counts, 0.0)
        part = term.advantage.log_ratio
        if part and part.spans_sequence:
            if teacher is None:
                raise ValueError(f"{name}: this advantage needs the teacher's log-probabilities")
            log_ratio = _teacher_log_ratio(part, teacher - then, tokens)
            means[f"{name}/advantage"] = _over_sequence(part, log_ratio, tokens.row, rows, counts)
    return means


def _over_sequence(spec: LogRatio, log_ratio: Tensor, row: Tensor, rows: int, counts: Tensor) -> Tensor:
    """The log-ratio, discounted and centered.  [M], row [M] long, [M] bool -> [M], 0 at tokens that are not counted."""
    if spec.discount:
        log_ratio = policy.discounted_sums(log_ratio, row, counts, spec.discount)
    if spec.center == "sequence":
        log_ratio = log_ratio - policy.sequence_mean(log_ratio, row, rows, counts)
    return log_ratio.masked_fill(~counts, 0.0)


def _spans_sequence(term: PolicyGradient) -> bool:
    part = term.advantage.log_ratio
    return part is not None and part.spans_sequence


def _teacher_log_ratio(spec: LogRatio | None, log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """The teacher's log-ratio before centering: bounded below, 0 if the rollout has no teacher prompt.  [M] -> [M]."""
    if spec and spec.floor is not None:
        log_ratio = log_ratio.clamp(min=spec.floor)
    return log_ratio if tokens.has_teacher is None else log_ratio.masked_fill(~tokens.has_teacher, 0.0)


def _sequence_mean(tokens: Tokens, name: str) -> Tensor:
    if name not in tokens.sequence_means:
        raise ValueError(f"{name} needs Tokens.sequence_means")
    return tokens.sequence_means[name]


def policy_gradient(
    name: str, term: PolicyGradient, sides: Distributions, tokens: Tokens, temperature: float
) -> tuple[Tensor, Tensor | float, LossMetrics]:
    """Returns ℓ [C] of the term `name`, its correction [C] (or 1) and its metrics."""
    now = _counted_logprobs(sides.student(temperature), tokens, name)
    then = now.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = now - then
    if term.ratio != "token" and tokens.old_logprobs is not None:
        log_ratio = policy.own_gradient(_sequence_mean(tokens, f"{name}/log_ratio"), now)
    advantages = _advantages(name, term, sides, tokens, then, temperature)
    ratio = policy.policy_ratio(log_ratio.detach())
    metrics = {"ratio": ratio, "advantage": advantages, **sides.entropies(temperature, "student")}
    if tokens.old_logprobs is not None:
        metrics["old_kl"] = policy.k3(then, now.detach())
    if clip := term.clip:
        token_loss = policy.clipped_surrogate(log_ratio, advantages, clip.low, clip.high, clip.dual)
        below, above = policy.clip_binds(ratio, advantages, clip.low, clip.high)
        metrics |= {"clip_low": below.to(ratio.dtype), "clip_high": above.to(ratio.dtype)}
        if clip.dual is not None:
            metrics["clip_dual"] = ((advantages < 0) & (ratio > clip.dual)).to(ratio.dtype)
    else:
        token_loss = policy.clipped_surrogate(log_ratio, advantages)
    if term.importance.sampler is None:
        return token_loss, 1.0, metrics
    corrected, ratios = correction(None, term.importance.sampler, now.detach(), tokens)
    return token_loss, corrected, metrics | ratios


def _advantages(
    name: str, term: PolicyGradient, sides: Distributions, tokens: Tokens, then: Tensor, temperature: float
) -> Tensor:
    """[C], detached; arbitrary at tokens that the term does not count."""

    def reward_advantage() -> Tensor:
        if tokens.advantages is None:
            raise ValueError(f"{name}: a group_relative advantage needs Tokens.advantages")
        return tokens.advantages.to(then.dtype)

    def teacher_advantage(spec: LogRatio) -> Tensor:
        if spec.spans_sequence:
            return _sequence_mean(tokens, f"{name}/advantage")
        teacher = sides.teacher_logprobs(tokens.token, temperature)
        return _teacher_log_ratio(spec, teacher - then, tokens)

    match spec := term.advantage:
        case GroupRelative():
            return reward_advantage()
        case LogRatio():
            return teacher_advantage(spec)
        case AdvantageAdd(group_weight=group, log_ratio_weight=teacher):
            return group * reward_advantage() + teacher * teacher_advantage(spec.log_ratio)
        case AdvantageScale(share=share, low=low, high=high):
            parts = reward_advantage(), teacher_advantage(spec.log_ratio)
            return policy.scaled_advantages(*parts, share, low, high)
        case _:
            assert_never(spec)


def reference_kl(
    name: str, term: ReferenceKl, sides: Distributions, tokens: Tokens, temperature: float
) -> tuple[Tensor, LossMetrics]:
    """Returns ℓ [C] of the term `name`, and its metrics."""
    student, reference = sides.student_and("reference", temperature, tokens.counts(name))
    pair = [_counted_logprobs(side, tokens, name) for side in (student, reference)]
    match term.estimator:
        case "k2":
            token_loss = policy.k2(*pair)
            with torch.no_grad():
                full_kl = reverse_kl(student, reference)
        case "vocabulary":
            token_loss = reverse_kl(student, reference)
            full_kl = token_loss.detach()
        case _:
            assert_never(term.estimator)
    metrics = {"k1": policy.k1(*pair).detach(), "reference_kl": full_kl}
    return token_loss, metrics | sides.entropies(temperature, "student")


def _counted_logprobs(logprobs: Tensor, tokens: Tokens, name: str) -> Tensor:
    """Log-probabilities of the sampled tokens, 0 at tokens that the term does not count.  [C, V] -> [C].

    An uncounted token may be impossible (−inf), which would give a NaN gradient.
    """
    return sampled_token(logprobs, tokens.token).masked_fill(tokens.weights[name] <= 0, 0.0)


def correction(
    to_old_policy: OldPolicyRatio | None, to_sampler: SamplerRatio | None, now: Tensor, tokens: Tokens
) -> tuple[Tensor, LossMetrics]:
    """Returns the product of the ratios, [C], and each ratio.  now [C]: detached log-probabilities."""
    old = now if tokens.old_logprobs is None else tokens.old_logprobs
    product, capped = torch.ones_like(now), torch.zeros_like(now, dtype=torch.bool)
    metrics: LossMetrics = {}
    if to_old_policy:
        ratio = policy.importance_ratio(now, old, to_old_policy.cap)
        product, metrics["old_ratio"] = product * ratio, ratio
        capped = capped | policy.cap_binds(now, old, to_old_policy.cap)
    if to_sampler:
        ratio = torch.ones_like(now)
        if (sampler := tokens.sampler_logprobs) is not None:
            capped = capped | policy.cap_binds(old, sampler, to_sampler.cap)
            ratio = policy.importance_ratio(old, sampler, to_sampler.cap)
            if to_sampler.level == "sequence_mean":
                if tokens.ratio is None:
                    raise ValueError("a sampler ratio of level sequence_mean needs Tokens.ratio")
                ratio = tokens.ratio
        product, metrics["sampler_ratio"] = product * ratio, ratio
    return product, metrics | {"ratio_capped": capped.to(now.dtype)}
