"""Builds one function of a chunk's logits from the loss terms of a spec.

Only this file, `policy_terms.py` and `top_k.py` read specs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import assert_never

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import Counts, Tokens, TopKLogprobs
from sdkit.language.errors import spelled
from sdkit.language.schedules import schedules
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
    LogRatio,
    Loss,
    MaskSpec,
    PerSequence,
    PerToken,
    PerTurn,
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
)
from sdkit.losses import average as averages
from sdkit.losses import divergence, policy
from sdkit.losses.distributions import Distributions
from sdkit.losses.policy_terms import (
    LossMetrics,
    correction,
    group_relative,
    needs_sequence_means,
    policy_gradient,
    reference_kl,
    sequence_means,
)
from sdkit.losses.support import sampled_token
from sdkit.losses.top_k import on_served_top_k, on_top_k

Probabilities = tuple[Tensor | None, Tensor | None]
"""Probabilities of student and teacher on the support, twice [C, K], where the objective has computed them already."""

UserDivergence = Callable[[Tensor, Tensor], Tensor]
"""A user-defined divergence: log-probabilities of student and teacher on the support, [C, K], [C, K] -> [C]."""


TOKEN_DIVERGENCE = "token_divergence"
"""The one entry of an objective's sums that has a value for each token, [C]: the divergence between teacher and student,
summed over the terms that compare them; 0 at tokens that they do not count."""


def unmasked_span(mask: MaskSpec, length: int) -> range:
    """Returns the positions of a completion of `length` tokens that a term counts; both bounds start at 0."""
    end = length if mask.prefix is None else min(length, mask.prefix)
    return range(min(mask.skip_first, end), end)


def row_weights(average: Average, lengths: Tensor, counts: Counts) -> Tensor:
    """Returns the weight of every counted token of each row.  lengths [N] long, global counts -> [N] float32."""
    match average:
        case PerToken():
            return averages.per_token(lengths, counts)
        case PerSequence(empty_rows="count"):
            return averages.per_sequence_count(lengths, counts)
        case PerSequence():
            return averages.per_sequence_skip(lengths, counts)
        case PerTurn():
            return averages.per_turn(lengths, counts)
        case SequenceSum():
            return averages.sequence_sum(lengths, counts)
        case Constant(length=length):
            return averages.constant(lengths, counts, length)
        case Sum():
            return averages.total(lengths)
        case _:
            assert_never(average)


class Objective:
    """Σ_terms coefficient · Σ_j weight_j · correction_j · ℓ_j over the tokens j of a chunk.

    With `per_token`, the sums have TOKEN_DIVERGENCE too.  `temperature` is the sampling temperature.  It applies to every term without a temperature of its own, and always to
    importance ratios (both sides are probabilities of sampling the token).  `functions` holds the user-defined
    divergences by term.  Raises TypeError for a schedule (`schedules.at_step` resolves them), ValueError for a sampled
    token with a divergence other than the reverse KL, for more than one term whose sampler ratio is a sequence mean,
    and for terms that ask for different group_relative advantages.
    Logits must be finite or -inf, also at tokens of weight 0; those add nothing even if their ℓ is inf.
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        temperature: float,
        functions: Mapping[str, UserDivergence] | None = None,
        *,
        per_token: bool = False,
    ) -> None:
        for path, _ in schedules(losses):
            raise TypeError(f"{spelled(path)} is a schedule, which has no value without a step: call at_step first")
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
        self._per_token = per_token

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.losses.values())

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen initial model must score the tokens under the student's prompt."""
        return any(isinstance(term, ReferenceKl) for term in self.losses.values())

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
        """Returns the scalar loss and sums over the chunk's tokens.  Logits [C, V] of any float dtype; C may be 0.

        `TopKLogprobs` in place of teacher logits suffice for a top_k support chosen by the teacher and for the sampled
        token; metrics of the teacher's full distribution are then missing.  Raises ValueError if a term needs more.
        The sums are detached scalars: `loss/NAME` is the term's share of the loss, `NAME/tokens` the number of
        tokens it counts (weight above 0), any other `NAME/x` the unweighted sum of x over those tokens.
        """
        sides = Distributions(student_logits, teacher, reference_logits)
        parts: list[Tensor] = []
        divergences: list[Tensor] = []
        stats: dict[str, Tensor] = {}
        for name, term in self.losses.items():
            token_loss, corrected, metrics = self._term(name, sides, tokens)
            weights = tokens.weights[name]
            counts = weights > 0
            weighted = weights * corrected * token_loss.masked_fill(~counts, 0.0)
            parts.append(term.coefficient * weighted.sum())
            stats[f"loss/{name}"] = parts[-1].detach()
            metrics = {"tokens": torch.ones_like(token_loss), "token_loss": token_loss, **metrics}
            for key, values in metrics.items():
                stats[f"{name}/{key}"] = values.detach().masked_fill(~counts, 0.0).sum()
            if self._per_token and (values := _teacher_divergence(term, metrics)) is not None:
                divergences.append(values.detach().masked_fill(~counts, 0.0))
        if divergences:
            stats[TOKEN_DIVERGENCE] = torch.stack(divergences).sum(0)
        return torch.stack(parts).sum(), stats

    def _term(self, name: str, sides: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor | float, LossMetrics]:
        """Returns one term's ℓ [C], its correction [C] (or 1) and its metrics."""
        match term := self.losses[name]:
            case CrossEntropy():
                token_loss = -sampled_token(sides.student(1.0), tokens.token)
                return token_loss, 1.0, sides.entropies(1.0, "student")
            case Distillation(importance=importance):
                token_loss, metrics = self._distillation(name, term, sides, tokens)
                if importance == ImportanceSpec():
                    return token_loss, 1.0, metrics
                now = sampled_token(sides.student(self._temperature), tokens.token).detach()
                corrected, ratios = correction(importance.old_policy, importance.sampler, now, tokens)
                return token_loss, corrected, metrics | ratios
            case PolicyGradient():
                return policy_gradient(name, term, sides, tokens, self._temperature)
            case ReferenceKl():
                token_loss, metrics = reference_kl(name, term, sides, tokens, self._temperature)
                return token_loss, 1.0, metrics
            case _:
                assert_never(term)

    def _distillation(
        self, name: str, term: Distillation, sides: Distributions, tokens: Tokens
    ) -> tuple[Tensor, LossMetrics]:
        """Returns ℓ [C] of a distillation term, and its metrics."""
        temperature = self._temperature if term.temperature is None else term.temperature
        counts = tokens.counts(name)
        student = sampled_token(sides.student(temperature), tokens.token)
        metrics = sides.entropies(temperature, "student", "teacher")
        if sides.has_sampled_logprobs(temperature):
            teacher = sides.teacher_logprobs(tokens.token, temperature, counts)
            metrics["k1"] = policy.k1(student, teacher).detach()
        known: Probabilities = None, None
        match term.support:
            case SampledTokenSupport():
                teacher = sides.teacher_logprobs(tokens.token, temperature, counts)
                return policy.sampled_token_surrogate(student, teacher, term.clip.log_ratio), metrics
            case VocabularySupport():
                pair = sides.student_and("teacher", temperature, counts)
                # They weigh differences that student_and has made 0 at tokens that do not count.
                known = sides.probabilities("student", temperature), sides.probabilities("teacher", temperature)
            case TopKSupport() as support if sides.top_k is not None:
                pair, shares = on_served_top_k(support, sides, temperature)
                metrics |= shares
            case TopKSupport() as support:
                pair, shares = on_top_k(support, *sides.student_and("teacher", temperature, counts))
                metrics |= shares
            case _:
                assert_never(term.support)
        token_loss = self._divergence(name, term, *pair, known)
        if term.clip.token is not None:
            metrics["token_clipped"] = (token_loss.detach() > term.clip.token).to(token_loss.dtype)
            token_loss = token_loss.clamp(max=term.clip.token)
        return token_loss, metrics | _both_kls(term, token_loss.detach(), *pair, known)

    def _divergence(
        self, name: str, term: Distillation, student: Tensor, teacher: Tensor, known: Probabilities
    ) -> Tensor:
        """[C, K], [C, K] -> [C]."""
        match spec := term.divergence:
            case ForwardKl():
                return divergence.forward_kl(student, teacher, _bounds(term.clip), probabilities=known[1])
            case ReverseKl(detach_weights=detach):
                bounds = _bounds(term.clip)
                return divergence.reverse_kl(student, teacher, bounds, detach_weights=detach, probabilities=known[0])
            case Jsd(teacher_share=share):
                return divergence.jsd(student, teacher, share)
            case LinearMix(forward_share=share):
                return divergence.linear_mix(student, teacher, share)
            case SkewedForwardKl(share=share):
                return divergence.skewed_forward_kl(student, teacher, share)
            case SkewedReverseKl(share=share):
                return divergence.skewed_reverse_kl(student, teacher, share)
            case FileDivergence():
                return self._functions[name](student, teacher.detach())
            case _:
                assert_never(spec)


@torch.no_grad()
def with_sequence_statistics(
    objective: Objective,
    tokens: Tokens,
    rows: int,
    current_logprobs: Callable[[], Tensor],
    teacher_logprobs: Callable[[], Tensor | None],
) -> Tokens:
    """Returns the tokens with `Tokens.ratio` and `Tokens.sequence_means`, where a term needs them.

    Chunks cannot compute these: they take complete sequences.  The functions return the log-probabilities of the sampled
    tokens at the sampling temperature, [M]; they are called only if needed.
    """
    needs_ratio = objective.needs_sequence_ratio and tokens.sampler_logprobs is not None
    if not needs_ratio and not objective.needs_sequence_means:
        return tokens
    old = tokens.old_logprobs
    current = current_logprobs() if old is None or objective.needs_sequence_means else old
    if needs_ratio:
        trainer = current if old is None else old
        tokens = evolve(tokens, ratio=sampler_ratio(objective.losses, trainer, tokens, rows))
    if objective.needs_sequence_means:
        means = sequence_means(objective.losses, current, teacher_logprobs(), tokens, rows)
        tokens = evolve(tokens, sequence_means=means)
    return tokens


def _teacher_divergence(term: Loss, metrics: LossMetrics) -> Tensor | None:
    """Returns how far teacher and student are apart at each token, [C]; None for a term that does not compare them."""
    match term:
        case Distillation(support=SampledTokenSupport()):
            return metrics.get("k1")
        case Distillation():
            return metrics["token_loss"]
        case PolicyGradient(advantage=LogRatio()):
            return -metrics["advantage"]
        case _:
            return None


def sampler_ratio(losses: Mapping[str, Loss], student_logprobs: Tensor, tokens: Tokens, rows: int) -> Tensor:
    """Returns the values of `Tokens.ratio`: the sampler ratio, capped per token, then averaged over each sequence.

    Applies to the one term with `sampler.level: sequence_mean`; raises ValueError if there is none.  The mean is over
    the tokens that this term counts, so complete sequences are needed.  student_logprobs [M] are those of the sampled
    tokens, now, at the sampling temperature; they replace missing `old_logprobs`.  -> [M]; 1 at tokens that the term
    does not count, and everywhere if the sampler gave no log-probabilities.  Shenfeld 2026 (code).
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
    capped = policy.importance_ratio(old, tokens.sampler_logprobs, cap)
    return torch.where(counts, policy.sequence_mean(capped, tokens.row, rows, counts), ratio)


def _sequence_mean_terms(losses: Mapping[str, Loss]) -> dict[str, float]:
    """Returns name and cap of each term whose sampler ratio is averaged per sequence."""
    ratios = {name: term.sampler_ratio for name, term in losses.items()}
    return {name: ratio.cap for name, ratio in ratios.items() if ratio and ratio.level == "sequence_mean"}


def _bounds(clip: DivergenceClip) -> divergence.Bounds:
    low, high = clip.log_ratio or (-math.inf, math.inf)
    return divergence.Bounds(low=low, high=high, entry=math.inf if clip.entry is None else clip.entry)


@torch.no_grad()
def _both_kls(
    term: Distillation, token_loss: Tensor, student: Tensor, teacher: Tensor, known: Probabilities
) -> LossMetrics:
    """Both directions on the support; the one that equals the loss is not computed again."""
    forward = reverse = None
    if term.clip == DivergenceClip():
        forward = token_loss if isinstance(term.divergence, ForwardKl) else None
        reverse = token_loss if isinstance(term.divergence, ReverseKl) else None
    if forward is None:
        forward = divergence.forward_kl(student, teacher, probabilities=known[1])
    if reverse is None:
        reverse = divergence.reverse_kl(student, teacher, probabilities=known[0])
    return {"forward_kl": forward, "reverse_kl": reverse}
