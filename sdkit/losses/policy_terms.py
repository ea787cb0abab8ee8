"""The terms about tokens that were sampled: policy gradient, pull to the reference, and the importance corrections.

Reads specs, like `objective.py`, which calls it chunk by chunk; the mathematics is in `policy.py`.  Everywhere
`temperature` is that of sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from sdkit.batches import Tokens
from sdkit.language.schedules import plain
from sdkit.language.specs import (
    AdvantageAdd,
    AdvantageScale,
    GroupRelative,
    ImportanceSpec,
    LogRatio,
    LossSpec,
    PolicyGradient,
    ReferenceKl,
    reward_part,
    teacher_part,
)
from sdkit.losses.distributions import Distributions
from sdkit.losses.divergence import reverse_kl
from sdkit.losses.policy import (
    cap_binds,
    clip_binds,
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    k1,
    k2,
    k3,
    own_gradient,
    policy_ratio,
    scaled_advantages,
    sequence_mean,
)
from sdkit.losses.support import sampled_token

Measures = dict[str, Tensor]
"""Figures per token, detached: name -> [C]."""


# ── before the first chunk ────────────────────────────────────────────────────────────────────


def policy_gradients(losses: Mapping[str, LossSpec]) -> dict[str, PolicyGradient]:
    """The terms of that kind, by name."""
    return {name: term for name, term in losses.items() if isinstance(term, PolicyGradient)}


def group_relative(losses: Mapping[str, LossSpec]) -> GroupRelative | None:
    """The advantage that `Tokens.advantages` holds.  Raises ValueError where two terms ask for different ones."""
    terms = policy_gradients(losses).values()
    asked = {part for t in terms if (part := reward_part(t.advantage))}
    if len(asked) > 1:
        raise ValueError("all terms must have the same group_relative advantage")
    return next(iter(asked), None)


def reward_advantages(
    losses: Mapping[str, LossSpec], rewards: Tensor, group: Tensor
) -> Tensor | None:
    """Each rollout's advantage, [N]; None where no term needs it.

    rewards [N] float and group [N] long are those of all ranks, before the rollouts are dealt into several updates.
    """
    spec = group_relative(losses)
    if spec is None:
        return None
    return group_advantages(rewards, group, spec.baseline, spec.scale, plain(spec.eps))


def needs_sequence_means(losses: Mapping[str, LossSpec]) -> bool:
    """Whether `Tokens.sequence_means` must be filled before the first chunk."""
    return any(
        term.ratio == "sequence" or _centered(term) for term in policy_gradients(losses).values()
    )


def sequence_means(
    losses: Mapping[str, LossSpec], now: Tensor, teacher: Tensor | None, tokens: Tokens, rows: int
) -> dict[str, Tensor]:
    """What `Tokens.sequence_means` holds: means over the tokens of each sequence that a term counts.

    `TERM/log_ratio`: log student now − before this batch (not there without `old_logprobs`: the ratio is 1 then).
    `TERM/advantage`: of the teacher's log-ratio, for `center: sequence`.  now [M], teacher [M]: log-probabilities of the
    sampled tokens at the sampling temperature, detached -> [M] each, 0 at tokens that the term does not count.
    """
    then = now if tokens.old_logprobs is None else tokens.old_logprobs
    means: dict[str, Tensor] = {}
    for name, term in policy_gradients(losses).items():
        counts = tokens.weights[name] > 0

        def mean(values: Tensor, counts: Tensor = counts) -> Tensor:
            held = sequence_mean(values[counts], tokens.row[counts], rows)
            return torch.zeros_like(values).masked_scatter(counts, held)

        if term.ratio == "sequence" and tokens.old_logprobs is not None:
            means[f"{name}/log_ratio"] = mean(now - then)
        if _centered(term):
            if teacher is None:
                raise ValueError(f"{name}: center: sequence needs the teacher's log-probabilities")
            spec = teacher_part(term.advantage)
            means[f"{name}/advantage"] = mean(_teachers(spec, teacher - then, tokens))
    return means


def _centered(term: PolicyGradient) -> bool:
    part = teacher_part(term.advantage)
    return part is not None and part.center == "sequence"


def _teachers(spec: LogRatio | None, log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """The teacher's part before it is centred: bounded below, 0 where a rollout has no teacher prompt.  [M] -> [M]."""
    if spec and spec.floor is not None:
        log_ratio = log_ratio.clamp(min=plain(spec.floor))
    return (
        log_ratio if tokens.has_teacher is None else log_ratio.masked_fill(~tokens.has_teacher, 0.0)
    )


def _sequence_mean(tokens: Tokens, name: str) -> Tensor:
    if name not in tokens.sequence_means:
        raise ValueError(f"{name} needs Tokens.sequence_means")
    return tokens.sequence_means[name]


# ── chunk by chunk ────────────────────────────────────────────────────────────────────────────


def policy_gradient(
    name: str, term: PolicyGradient, sides: Distributions, tokens: Tokens, temperature: float
) -> tuple[Tensor, Tensor | float, Measures]:
    """ℓ [C] of the term called `name`, its correction [C] (or 1) and its measures."""
    now = _counted_logprobs(sides.student(temperature), tokens, name)
    then = now.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = now - then
    if term.ratio == "sequence" and tokens.old_logprobs is not None:
        log_ratio = own_gradient(_sequence_mean(tokens, f"{name}/log_ratio"), now)
    advantages = _advantages(name, term, sides, tokens, then, temperature)
    ratio = policy_ratio(log_ratio.detach())
    measures = {"ratio": ratio, "advantage": advantages, **sides.entropies(temperature, "student")}
    if tokens.old_logprobs is not None:
        measures["old_kl"] = k3(then, now.detach())
    if clip := term.clip:
        low, high = plain(clip.low), plain(clip.high)
        dual = None if clip.dual is None else plain(clip.dual)
        token_loss = clipped_surrogate(log_ratio, advantages, low, high, dual)
        below, above = clip_binds(ratio, advantages, low, high)
        measures |= {"clip_low": below.to(ratio.dtype), "clip_high": above.to(ratio.dtype)}
        if dual is not None:
            measures["clip_dual"] = ((advantages < 0) & (ratio > dual)).to(ratio.dtype)
    else:
        token_loss = clipped_surrogate(log_ratio, advantages)
    if term.importance.sampler is None:
        return token_loss, 1.0, measures
    importance = ImportanceSpec(sampler=term.importance.sampler)
    corrected, ratios = correction(importance, now.detach(), tokens)
    return token_loss, corrected, measures | ratios


def _advantages(
    name: str,
    term: PolicyGradient,
    sides: Distributions,
    tokens: Tokens,
    then: Tensor,
    temperature: float,
) -> Tensor:
    """[C], detached; anything at tokens that the term does not count."""

    def of_reward() -> Tensor:
        if tokens.advantages is None:
            raise ValueError(f"{name}: a group_relative advantage needs Tokens.advantages")
        return tokens.advantages.to(then.dtype)

    def of_teacher(spec: LogRatio) -> Tensor:
        teacher = sides.teacher_sampled(tokens.token, temperature)
        advantages = _teachers(spec, teacher - then, tokens)
        if spec.center == "sequence":
            advantages = advantages - _sequence_mean(tokens, f"{name}/advantage")
        return advantages

    match spec := term.advantage:
        case GroupRelative():
            return of_reward()
        case LogRatio():
            return of_teacher(spec)
        case AdvantageAdd(group_weight=group, log_ratio_weight=teacher):
            return plain(group) * of_reward() + plain(teacher) * of_teacher(spec.log_ratio)
        case AdvantageScale(share=share, low=low, high=high):
            parts = of_reward(), of_teacher(spec.log_ratio)
            return scaled_advantages(*parts, plain(share), plain(low), plain(high))
        case _:
            assert_never(spec)


def reference_kl(
    name: str, term: ReferenceKl, sides: Distributions, tokens: Tokens, temperature: float
) -> tuple[Tensor, Measures]:
    """ℓ [C] of the term called `name`, and its measures."""
    student, reference = sides.teacher("reference", temperature, tokens.weights[name] > 0)
    pair = [_counted_logprobs(side, tokens, name) for side in (student, reference)]
    match term.estimator:
        case "k2":
            token_loss = k2(*pair)
            with torch.no_grad():
                whole = reverse_kl(student, reference)
        case "vocabulary":
            token_loss = reverse_kl(student, reference)
            whole = token_loss.detach()
        case _:
            assert_never(term.estimator)
    measures = {"k1": k1(*pair).detach(), "reference_kl": whole}
    return token_loss, measures | sides.entropies(temperature, "student")


def _counted_logprobs(logprobs: Tensor, tokens: Tokens, name: str) -> Tensor:
    """Log-probabilities of the sampled tokens, 0 where the term does not count one.  [C, V] -> [C].

    A token that does not count may be impossible (−inf): it must not make a NaN on the way back.
    """
    return sampled_token(logprobs, tokens.token).masked_fill(tokens.weights[name] <= 0, 0.0)


def correction(spec: ImportanceSpec, now: Tensor, tokens: Tokens) -> tuple[Tensor, Measures]:
    """Product of the ratios that `spec` asks for, [C], and each of them.  now [C]: detached log-probabilities."""
    old = now if tokens.old_logprobs is None else tokens.old_logprobs
    product, capped = torch.ones_like(now), torch.zeros_like(now, dtype=torch.bool)
    measures: Measures = {}
    if spec.old_policy:
        ratio = importance_ratio(now, old, plain(spec.old_policy.cap))
        product, measures["old_ratio"] = product * ratio, ratio
        capped = capped | cap_binds(now, old, plain(spec.old_policy.cap))
    if spec.sampler:
        ratio = torch.ones_like(now)
        if (sampler := tokens.sampler_logprobs) is not None:
            capped = capped | cap_binds(old, sampler, plain(spec.sampler.cap))
            ratio = importance_ratio(old, sampler, plain(spec.sampler.cap))
            if spec.sampler.level == "sequence_mean":
                if tokens.ratio is None:
                    raise ValueError("a sampler ratio of level sequence_mean needs Tokens.ratio")
                ratio = tokens.ratio
        product, measures["sampler_ratio"] = product * ratio, ratio
    return product, measures | {"ratio_capped": capped.to(now.dtype)}
