"""From the loss terms of a spec to one function of a chunk's logits.  Only this file and `policy_terms.py` read specs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import assert_never

import torch
from torch import Tensor

from sdkit.batches import Counts, Tokens, TopKLogprobs
from sdkit.language.schedules import plain
from sdkit.language.specs import (
    Average,
    Constant,
    CrossEntropy,
    Distillation,
    DivergenceClip,
    FileDivergence,
    ForwardKl,
    ImportanceSpec,
    Jsd,
    LinearMix,
    Loss,
    LossSpec,
    MaskSpec,
    PerSequence,
    PerToken,
    PolicyGradient,
    ReferenceKl,
    ReverseKl,
    SampledTokenSupport,
    SequenceSum,
    SkewedForwardKl,
    SkewedReverseKl,
    Sum,
    TopKSupport,
    VocabularySupport,
    needs_teacher,
)
from sdkit.losses import average as averages
from sdkit.losses.distributions import Distributions
from sdkit.losses.divergence import (
    Bounds,
    forward_kl,
    jsd,
    linear_mix,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from sdkit.losses.policy import importance_ratio, k1, sampled_token_surrogate, sequence_mean
from sdkit.losses.policy_terms import (
    Measures,
    correction,
    group_relative,
    needs_sequence_means,
    policy_gradient,
    reference_kl,
)
from sdkit.losses.support import (
    mass,
    on_served_top_k,
    on_support,
    overlap,
    sampled_token,
    top_k_ids,
    union_ids,
)

UserDivergence = Callable[[Tensor, Tensor], Tensor]
"""A user's own: log-probabilities of student and teacher on the support, [C, K], [C, K] -> [C]."""


def unmasked_span(mask: MaskSpec, length: int) -> range:
    """Positions of a completion of `length` tokens that a term counts; both bounds are taken from its start."""
    end = length if mask.prefix is None else min(length, mask.prefix)
    return range(min(mask.skip_first, end), end)


def row_weights(average: Average, lengths: Tensor, counts: Counts) -> Tensor:
    """Weight of every counted token of a row.  lengths [N] long, global counts -> [N] float32."""
    match average:
        case PerToken():
            return averages.per_token(lengths, counts)
        case PerSequence(empty_rows="count"):
            return averages.per_sequence_count(lengths, counts)
        case PerSequence():
            return averages.per_sequence_skip(lengths, counts)
        case SequenceSum():
            return averages.sequence_sum(lengths, counts)
        case Constant(length=length):
            return averages.constant(lengths, counts, plain(length))
        case Sum():
            return averages.total(lengths)
        case _:
            assert_never(average)


class Objective:
    """Σ_terms coefficient · Σ_j weight_j · correction_j · ℓ_j over the tokens j of a chunk.

    `temperature` is the sampling temperature: that of a term which sets none, and of the importance ratios always
    (both of their sides are probabilities of having sampled the token).  Every number of the terms is a plain one
    (`schedules.at_step`); `functions` holds the user's own divergences by term.  Raises ValueError for a sampled token with
    a divergence other than the reverse KL, for more than one term whose sampler ratio is a sequence mean, and for
    terms that ask for different group_relative advantages.
    Logits must be finite or -inf, also at tokens of weight 0, which add nothing even where their ℓ is inf.
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        temperature: float,
        functions: Mapping[str, UserDivergence] | None = None,
    ) -> None:
        for name, term in losses.items():
            if isinstance(term, Distillation) and isinstance(term.support, SampledTokenSupport):
                if not isinstance(term.divergence, ReverseKl):
                    raise ValueError(f"{name}: one sampled token can only estimate reverse_kl")
        if len(_sequence_mean_terms(losses)) > 1:
            raise ValueError("only one term can have a sampler ratio of level sequence_mean")
        group_relative(losses)
        self.losses = losses
        self._functions = functions or {}
        self._temperature = temperature

    @property
    def needs_teacher(self) -> bool:
        return any(needs_teacher(term) for term in self.losses.values())

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen start model must score the tokens under the student's prompt."""
        return any(isinstance(term, ReferenceKl) for term in self.losses.values())

    @property
    def needs_advantages(self) -> bool:
        """Whether `Tokens.advantages` must be filled (`reward_advantages`)."""
        return group_relative(self.losses) is not None

    @property
    def needs_sequence_ratio(self) -> bool:
        """Whether `Tokens.ratio` must be filled (`sampler_ratio`) before the first chunk."""
        return bool(_sequence_mean_terms(self.losses))

    @property
    def needs_sequence_means(self) -> bool:
        """Whether `Tokens.sequence_means` must be filled (`sequence_means`) before the first chunk."""
        return needs_sequence_means(self.losses)

    def __call__(
        self,
        student_logits: Tensor,
        teacher: Tensor | TopKLogprobs | None,
        tokens: Tokens,
        reference_logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [C, V] of any float dtype, C tokens (may be 0) -> scalar loss, sums over the chunk's tokens.

        Instead of its logits, what the teacher told of some ids will do for a top_k that it chose and for the sampled
        token; figures of its whole distribution are then missing.  ValueError where a term needs more.
        The sums are detached scalars: `loss/NAME` is the term's share of the loss, `NAME/tokens` the number of
        tokens it counts (weight above 0), any other `NAME/x` the sum of x over those tokens, unweighted.
        """
        sides = Distributions(student_logits, teacher, reference_logits)
        parts: list[Tensor] = []
        stats: dict[str, Tensor] = {}
        for name, term in self.losses.items():
            token_loss, corrected, measures = self._term(name, sides, tokens)
            weights = tokens.weights[name]
            counts = weights > 0
            weighted = weights * corrected * token_loss.masked_fill(~counts, 0.0)
            parts.append(plain(term.coefficient) * weighted.sum())
            stats[f"loss/{name}"] = parts[-1].detach()
            measures = {"tokens": torch.ones_like(token_loss), "token_loss": token_loss, **measures}
            for key, values in measures.items():
                stats[f"{name}/{key}"] = values.detach().masked_fill(~counts, 0.0).sum()
        return torch.stack(parts).sum(), stats

    def _term(
        self, name: str, sides: Distributions, tokens: Tokens
    ) -> tuple[Tensor, Tensor | float, Measures]:
        """One term's ℓ [C], its correction [C] (or 1) and its measures."""
        match term := self.losses[name]:
            case CrossEntropy():
                token_loss = -sampled_token(sides.student(1.0), tokens.token)
                return token_loss, 1.0, sides.entropies(1.0, "student")
            case Distillation(importance=importance):
                token_loss, measures = self._distil(name, term, sides, tokens)
                if importance == ImportanceSpec():
                    return token_loss, 1.0, measures
                now = sampled_token(sides.student(self._temperature), tokens.token).detach()
                corrected, ratios = correction(importance, now, tokens)
                return token_loss, corrected, measures | ratios
            case PolicyGradient():
                return policy_gradient(name, term, sides, tokens, self._temperature)
            case ReferenceKl():
                token_loss, measures = reference_kl(name, term, sides, tokens, self._temperature)
                return token_loss, 1.0, measures
            case _:
                assert_never(term)

    def _distil(
        self, name: str, term: Distillation, sides: Distributions, tokens: Tokens
    ) -> tuple[Tensor, Measures]:
        """ℓ [C] of a distillation term, and its measures."""
        temperature = self._temperature if term.temperature is None else plain(term.temperature)
        counts = tokens.weights[name] > 0
        own = sampled_token(sides.student(temperature), tokens.token)
        measures = sides.entropies(temperature, "student", "teacher")
        if sides.knows_sampled(temperature):
            theirs = sides.teacher_sampled(tokens.token, temperature, counts)
            measures["k1"] = k1(own, theirs).detach()
        match term.support:
            case SampledTokenSupport():
                theirs = sides.teacher_sampled(tokens.token, temperature, counts)
                return sampled_token_surrogate(own, theirs, term.clip.log_ratio), measures
            case VocabularySupport():
                pair = sides.teacher("teacher", temperature, counts)
            case TopKSupport() as support if sides.told is not None:
                pair, shares = _on_served_top_k(support, sides, temperature)
                measures |= shares
            case TopKSupport() as support:
                pair, shares = _on_top_k(support, *sides.teacher("teacher", temperature, counts))
                measures |= shares
            case _:
                assert_never(term.support)
        token_loss = self._divergence(name, term, *pair)
        if term.clip.token is not None:
            limit = plain(term.clip.token)
            measures["token_clipped"] = (token_loss.detach() > limit).to(token_loss.dtype)
            token_loss = token_loss.clamp(max=limit)
        return token_loss, measures | _both_kls(term, token_loss.detach(), *pair)

    def _divergence(
        self, name: str, term: Distillation, student: Tensor, teacher: Tensor
    ) -> Tensor:
        """[C, K], [C, K] -> [C]."""
        match spec := term.divergence:
            case ForwardKl():
                return forward_kl(student, teacher, _bounds(term.clip))
            case ReverseKl(detach_weights=detach):
                return reverse_kl(student, teacher, _bounds(term.clip), detach_weights=detach)
            case Jsd(teacher_share=share):
                return jsd(student, teacher, plain(share))
            case LinearMix(forward_share=share):
                return linear_mix(student, teacher, plain(share))
            case SkewedForwardKl(share=share):
                return skewed_forward_kl(student, teacher, plain(share))
            case SkewedReverseKl(share=share):
                return skewed_reverse_kl(student, teacher, plain(share))
            case FileDivergence():
                return self._functions[name](student, teacher.detach())
            case _:
                assert_never(spec)


def sampler_ratio(
    losses: Mapping[str, LossSpec], student_logprobs: Tensor, tokens: Tokens, rows: int
) -> Tensor:
    """What `Tokens.ratio` holds: the sampler ratio, capped per token, then averaged over each sequence.

    For the one term with `sampler.level: sequence_mean` (ValueError where none is); the mean is over the tokens that
    this term counts, so whole sequences are needed.  student_logprobs [M]: of the sampled tokens, now, at the sampling
    temperature; used where `old_logprobs` are missing.  -> [M]; 1 at tokens the term does not count, and everywhere
    where the sampler gave no log-probabilities.  Shenfeld 2026 (code), reference/methods.md §5.5.
    """
    names = _sequence_mean_terms(losses)
    if not names:
        raise ValueError("no term has a sampler ratio of level sequence_mean")
    ((name, cap),) = names.items()
    ratio = torch.ones_like(student_logprobs)
    if tokens.sampler_logprobs is None:
        return ratio
    old = student_logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    counts = tokens.weights[name] > 0
    capped = importance_ratio(old, tokens.sampler_logprobs, cap)[counts]
    return ratio.masked_scatter(counts, sequence_mean(capped, tokens.row[counts], rows))


def _sequence_mean_terms(losses: Mapping[str, LossSpec]) -> dict[str, float]:
    """Name and cap of each term whose sampler ratio is averaged per sequence."""
    corrected = {n: t for n, t in losses.items() if isinstance(t, Distillation | PolicyGradient)}
    samplers = {n: t.importance.sampler for n, t in corrected.items()}
    return {n: plain(s.cap) for n, s in samplers.items() if s and s.level == "sequence_mean"}


def _top_k(
    support: TopKSupport, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor, Measures]:
    """ids [C, K] long, duplicate [C, K] bool, and what share of each side they hold."""
    of_student, of_teacher = top_k_ids(student, support.k), top_k_ids(teacher, support.k)
    match support.chosen_by:
        case "student":
            ids, duplicate = of_student, torch.zeros_like(of_student, dtype=torch.bool)
        case "teacher":
            ids, duplicate = of_teacher, torch.zeros_like(of_teacher, dtype=torch.bool)
        case "union":
            ids, duplicate = union_ids(of_student, of_teacher)
        case _:
            assert_never(support.chosen_by)
    shares = {
        "student_mass": mass(student, ids, duplicate),
        "teacher_mass": mass(teacher, ids, duplicate),
        "overlap": overlap(of_student, of_teacher),
    }
    return ids, duplicate, shares


def _on_top_k(
    support: TopKSupport, student: Tensor, teacher: Tensor
) -> tuple[tuple[Tensor, Tensor], Measures]:
    """Both sides on the support, and what share of each it holds."""
    ids, duplicate, shares = _top_k(support, student.detach(), teacher)
    return on_support(student, teacher, ids, duplicate, support.remainder), shares


def _on_served_top_k(
    support: TopKSupport, sides: Distributions, temperature: float
) -> tuple[tuple[Tensor, Tensor], Measures]:
    """The same where the teacher told of its own top k, at temperature 1.

    Rescaled to one they may be tempered, since log T / τ is then known up to a constant.  Raises ValueError for what
    cannot be known: another's choice, more tokens, the mass outside them at another temperature.
    """
    told, student, k = sides.told, sides.student(temperature), support.k
    assert told is not None
    if support.chosen_by != "teacher" or k > told.ids.shape[-1]:
        raise ValueError(
            f"the teacher told of its own top {told.ids.shape[-1]}, not of the {support.chosen_by}'s top {k}"
        )
    if temperature != 1 and support.remainder in ("tail_bucket", "drop"):
        raise ValueError(f"what the teacher told has no {support.remainder} at {temperature:g}")
    ids, kept = told.ids[:, :k], told.logprobs[:, :k].to(student.dtype)
    absent = kept == -math.inf
    chosen = torch.where(absent, -1 - torch.arange(k, device=ids.device), ids)
    shares = {
        "student_mass": mass(student.detach(), ids, absent),
        "overlap": overlap(top_k_ids(student, k), chosen),
    }
    if temperature == 1:
        shares["teacher_mass"] = kept.exp().sum(-1)
    return on_served_top_k(student, kept / temperature, ids, support.remainder), shares


def _bounds(clip: DivergenceClip) -> Bounds:
    low, high = clip.log_ratio or (-math.inf, math.inf)
    return Bounds(low=low, high=high, entry=math.inf if clip.entry is None else plain(clip.entry))


@torch.no_grad()
def _both_kls(term: Distillation, token_loss: Tensor, student: Tensor, teacher: Tensor) -> Measures:
    """Both directions on the support; the one that is the loss itself is not computed again."""
    whole = term.clip == DivergenceClip()
    forward, reverse = (
        token_loss if whole and isinstance(term.divergence, kind) else function(student, teacher)
        for kind, function in ((ForwardKl, forward_kl), (ReverseKl, reverse_kl))
    )
    return {"forward_kl": forward, "reverse_kl": reverse}
