"""Describes a spec's objective and sampling in words, for `sdkit plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from sdkit.language.specs import (
    Advantage,
    AdvantageAdd,
    AdvantageScale,
    Average,
    ClipSpec,
    Constant,
    CrossEntropy,
    DatasetSamples,
    Distillation,
    Divergence,
    DriftWeight,
    FileDivergence,
    FileWeight,
    ForwardKl,
    GroupRelative,
    Jsd,
    Keep,
    LinearMix,
    LogRatio,
    LossSpec,
    MethodSpec,
    MixtureSamples,
    NonConstantGroup,
    NonEmpty,
    OverlongPenalty,
    PassRateWeight,
    PerplexityWeight,
    PerSequence,
    PerToken,
    PolicyGradient,
    PositionWeight,
    ReferenceKl,
    ReverseKl,
    RewardAtLeast,
    SampledTokenSupport,
    SamplerRatio,
    Schedule,
    SequenceSum,
    SkewedForwardKl,
    SkewedReverseKl,
    StudentSamples,
    Sum,
    Support,
    TeacherEntropyWeight,
    TeacherSamples,
    TopKSupport,
    VocabularySupport,
    Weight,
)


def describe_losses(spec: MethodSpec) -> Iterator[str]:
    """Yields one line per loss term: `distil: forward KL(teacher‖student) over the whole vocabulary, temperature 1, …`."""
    for name, term in spec.losses.items():
        match term:
            case Distillation():
                yield f"{name}: {_distillation(term, spec.rollout.temperature)}"
            case CrossEntropy():
                text = f"cross entropy of the completion's tokens{_mask(term)}, {_average(term.average)}"
                yield f"{name}: {_factor(term.coefficient)}{text}{_weight(term.weight)}"
            case PolicyGradient():
                yield f"{name}: {_policy_gradient(term)}"
            case ReferenceKl(estimator=estimator):
                over = {"k2": "estimated from the sampled token (k2)", "vocabulary": "over the whole vocabulary"}
                text = f"{_factor(term.coefficient)}reverse KL(student‖start model) {over[estimator]}"
                yield f"{name}: {text}, {_average(term.average)}{_mask(term)}"
            case _:
                assert_never(term)


def describe_sampling(spec: MethodSpec) -> str:
    """Describes who samples the completions, and how."""
    match spec.rollout.sampled_by:
        case DatasetSamples(column=column, drawn_by=drawn_by):
            source = "the student's logged answers" if drawn_by == "student" else "the data set's own completions"
            return f"{source} (column {column})"
        case StudentSamples():
            who = "student on its own prompt"
        case TeacherSamples(weights=weights, prompt=prompt):
            who = f"{weights}'s weights on the {prompt}'s prompt"
        case MixtureSamples(student_share=share, column=column):
            other = f"otherwise the data set's completions (column {column})"
            who = f"student on its own prompt, for {format_number(share)} of the batches, {other}"
        case other:
            assert_never(other)
    r = spec.rollout
    filters = f", kept where {_keep(r.keep)}" if r.keep else ""
    truncation = (f", top_p {r.top_p:g}" if r.top_p < 1 else "") + (f", top_k {r.top_k}" if r.top_k else "")
    length = f"{r.completions_per_prompt} × {r.max_new_tokens} tokens"
    return f"{who}, {length} at temperature {r.temperature:g}{truncation}{filters}"


def _keep(keep: Sequence[Keep]) -> str:
    conditions: list[str] = []
    for condition in keep:
        match condition:
            case NonEmpty():
                conditions.append("not empty")
            case RewardAtLeast(threshold=threshold):
                conditions.append(f"the reward is at least {threshold:g}")
            case NonConstantGroup():
                conditions.append("the group's rewards differ")
            case _:
                assert_never(condition)
    return " and ".join(conditions)


def _distillation(term: Distillation, temperature: float) -> str:
    importance = term.importance
    parts = [
        f"{_factor(term.coefficient)}{_divergence(term.divergence)} over {_support(term.support)}{_limits(term)}",
        f"temperature {format_number(term.temperature or temperature)}",
        _average(term.average) + _mask(term) + _weight(term.weight),
    ]
    if importance.old_policy:
        parts.append(f"ratio to the old policy capped at {format_number(importance.old_policy.cap)}")
    if importance.sampler:
        parts.append(_sampler(importance.sampler))
    return ", ".join(parts)


def _sampler(ratio: SamplerRatio) -> str:
    level = ratio.level.replace("_", " ")
    return f"ratio to the sampler ({level}) capped at {format_number(ratio.cap)}"


def _policy_gradient(term: PolicyGradient) -> str:
    parts = [
        f"{_factor(term.coefficient)}policy gradient, advantage {_advantage(term.advantage)}",
        f"ratio per {term.ratio}{_clip(term.clip)}",
        _average(term.average) + _mask(term) + _weight(term.weight),
    ]
    if sampler := term.importance.sampler:
        parts.append(_sampler(sampler))
    return ", ".join(parts)


def _advantage(advantage: Advantage) -> str:
    match advantage:
        case GroupRelative(baseline=baseline, scale=scale, eps=eps, overlong=overlong):
            centered = "reward" if overlong is None else f"reward{_overlong(overlong)}"
            centered += " − group mean" if baseline == "group_mean" else ""
            if scale == "none":
                return centered
            return f"({centered}) / ({scale.replace('_', ' ')} + {format_number(eps)})"
        case LogRatio(center=center, floor=floor, below_floor=below):
            low = ""
            if floor is not None:
                where = "where it is " if below == "leave_out" else ""
                low = f" ({where}at least {format_number(floor)})"
            mean = " − its mean over the sequence" if center == "sequence" else ""
            return f"log teacher − log student{low}{mean}"
        case AdvantageAdd(group_weight=group, log_ratio_weight=teacher):
            reward, ratio = _advantage(advantage.group_relative), _advantage(advantage.log_ratio)
            return f"{_factor(group)}({reward}) + {_factor(teacher)}({ratio})"
        case AdvantageScale(share=share, low=low, high=high):
            reward, ratio = _advantage(advantage.group_relative), _advantage(advantage.log_ratio)
            bounds = _bounds(low, high)
            return f"({reward}) scaled by exp(± ({ratio})) within {bounds}, for a share of {format_number(share)}"
        case _:
            assert_never(advantage)


def _overlong(penalty: OverlongPenalty) -> str:
    return (
        f" ({format_number(penalty.amount)} off a full-length completion, less over its last {penalty.stretch} tokens)"
    )


def _bounds(low: float | Schedule, high: float | Schedule) -> str:
    if isinstance(low, Schedule) or isinstance(high, Schedule):
        return f"1 − ({format_number(low)}) … 1 + ({format_number(high)})"
    return f"{1 - low:g} … {1 + high:g}"


def _clip(clip: ClipSpec | None) -> str:
    if clip is None:
        return ""
    dual = f" (dual {format_number(clip.dual)})" if clip.dual is not None else ""
    return f" clipped to {_bounds(clip.low, clip.high)}{dual}"


def _divergence(divergence: Divergence) -> str:
    match divergence:
        case ForwardKl():
            return "forward KL(teacher‖student)"
        case ReverseKl():
            return "reverse KL(student‖teacher)"
        case Jsd(teacher_share=share):
            return f"Jensen-Shannon divergence (teacher_share {format_number(share)})"
        case LinearMix(forward_share=share):
            if isinstance(share, Schedule):
                return f"forward KL and reverse KL (forward_share {format_number(share)})"
            return f"{share:g} × forward KL + {1 - share:g} × reverse KL"
        case SkewedForwardKl(share=share):
            return f"skewed forward KL(teacher‖mixture), {format_number(share)} of it the teacher"
        case SkewedReverseKl(share=share):
            return f"skewed reverse KL(student‖mixture), {format_number(share)} of it the student"
        case FileDivergence(file=file, function=function):
            return f"{function} in {file}"
        case _:
            assert_never(divergence)


def _limits(term: Distillation) -> str:
    clip, parts = term.clip, list[str]()
    if isinstance(term.divergence, ReverseKl) and term.divergence.detach_weights:
        parts.append("weights detached")
    if clip.log_ratio:
        parts.append("log student − log teacher within {:g} … {:g}".format(*clip.log_ratio))
    if clip.entry is not None:
        parts.append(f"each entry at most {format_number(clip.entry)}")
    if clip.token is not None:
        parts.append(f"each token at most {format_number(clip.token)}")
    return "".join(f", {part}" for part in parts)


def _support(support: Support) -> str:
    match support:
        case VocabularySupport():
            return "the whole vocabulary"
        case SampledTokenSupport():
            return "the sampled token"
        case TopKSupport(k=k, chosen_by=who, remainder=rest):
            whose = "both sides'" if who == "union" else f"the {who}'s"
            return f"{whose} top {k} tokens ({rest.replace('_', ' ')})"
        case _:
            assert_never(support)


def _average(average: Average) -> str:
    match average:
        case PerToken(denominator="joint"):
            return "sum over tokens / tokens of all terms that say joint"
        case PerToken(denominator="completions"):
            return "sum over tokens / tokens of all completions"
        case PerToken():
            return "mean over tokens"
        case PerSequence(empty_rows=rows):
            return f"mean over each sequence, then sequences (empty ones {'count' if rows == 'count' else 'skipped'})"
        case SequenceSum():
            return "sum over each sequence, mean over sequences"
        case Constant(length=length):
            return f"sum over tokens / (sequences × {format_number(length)})"
        case Sum():
            return "sum over tokens"
        case _:
            assert_never(average)


def _mask(term: LossSpec) -> str:
    mask = term.mask
    parts = [
        f"first {mask.skip_first} tokens left out" * bool(mask.skip_first),
        f"only the first {mask.prefix} tokens" * bool(mask.prefix),
        "special tokens left out" * (mask.special_tokens == "leave_out"),
    ]
    if mask.teacher_entropy_above is not None:
        parts.append(f"only where the teacher's entropy exceeds {format_number(mask.teacher_entropy_above)}")
    if mask.student_entropy_top is not None:
        top = mask.student_entropy_top
        share = f"share {format_number(top)}" if isinstance(top, Schedule) else f"{100 * top:g} %"
        parts.append(f"only the {share} of tokens with the student's largest entropies")
    return "".join(f", {part}" for part in parts if part)


def _weight(weight: Weight | None) -> str:
    match weight:
        case None:
            return ""
        case PositionWeight(smallest=smallest, middle=middle, width=width):
            text = f"rising from {format_number(smallest)} to 1 around {format_number(middle)} of the completion (width {format_number(width)})"
        case TeacherEntropyWeight(rate=rate):
            text = f"exp(−{format_number(rate)} × teacher's entropy) / its mean"
        case DriftWeight(strength=strength):
            text = f"1 + {format_number(strength)} × (1 − share of |log teacher − log student| before the token)"
        case PassRateWeight(power=power, threshold=threshold):
            text = f"(p (1 − p))^{format_number(power)}, p the group's share of rewards of at least {format_number(threshold)}"
        case PerplexityWeight(of=who, power=power):
            text = f"the {who}'s perplexity^{format_number(power)} / its mean in the group"
        case FileWeight(file=file, function=function):
            text = f"{function} in {file}"
        case _:
            assert_never(weight)
    return f", weighted by {text}"


def describe_route(spec: MethodSpec) -> Iterator[str]:
    """Yields a line on which terms train on a rollout, if that depends on its outcome."""
    route = spec.route
    if route is None:
        return
    context = " and a teacher prompt" * (route.when == "failed_with_context")
    then, otherwise = (", ".join(names) or "no term" for names in (route.then, route.otherwise))
    yield f"route: rollouts with a reward below {route.threshold:g}{context} go to {then}, others to {otherwise}"


def _factor(coefficient: float | Schedule) -> str:
    if isinstance(coefficient, Schedule):
        return f"({format_number(coefficient)}) × "
    return "" if coefficient == 1 else f"{coefficient:g} × "


def format_number(value: float | Schedule) -> str:
    """Formats a number or a schedule."""
    if isinstance(value, Schedule):
        return f"{value.start:g} → {value.to:g} over {value.steps} steps"
    return f"{value:g}"
