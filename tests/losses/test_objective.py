import math
from collections import defaultdict

import pytest
import torch
from attrs import evolve
from torch.testing import assert_close

from sdkit.language.schedules import at_step
from sdkit.language.specs import (
    CrossEntropy,
    Distillation,
    DivergenceClip,
    FileDivergence,
    ForwardKl,
    GroupRelative,
    ImportanceSpec,
    Jsd,
    LinearMix,
    LogRatio,
    MaskSpec,
    OldPolicyRatio,
    PolicyGradient,
    ReverseKl,
    SampledTokenSupport,
    SamplerRatio,
    Schedule,
    SkewedForwardKl,
    SkewedReverseKl,
    Table,
    TopKSupport,
    VocabularySupport,
)
from sdkit.losses.objective import TOKEN_DIVERGENCE, Objective, sampler_ratio, unmasked_span
from sdkit.losses.policy import importance_ratio

DIVERGENCES = [
    ForwardKl(),
    ReverseKl(),
    Jsd(teacher_share=0.3),
    LinearMix(forward_share=0.2),
    SkewedForwardKl(share=0.1),
    SkewedReverseKl(share=0.3),
]
MOVES = Schedule(start=0.2, to=0.6, steps=4)
SHARE = {"jsd": 0.3, "linear_mix": 0.2, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.3}
WEIGHTS = torch.tensor([0.5, 0.0, 0.25, 1.0, 2.0])
TOKEN = [3, 0, 6, 2, 2]


def name_of(spec):
    return spec.kind if hasattr(spec, "kind") else str(spec)


def distil(divergence=None, support=None, **settings):
    return Distillation(divergence=divergence or ForwardKl(), support=support or VocabularySupport(), **settings)


def objective_of(*terms, temperature=1.0, **named):
    table = Table({**({"distil": terms[0]} if terms else {}), **named})
    return Objective(table, temperature)


def loss_gradient_stats(objective, logits, tokens):
    loss, stats = objective(logits.student, logits.teacher, tokens)
    (grad,) = torch.autograd.grad(loss, logits.student)
    return loss.detach(), grad, stats


def by_loops(naive, logits, token_loss):
    """Σ_j weight_j ℓ_j and its gradient, position by position; token_loss(j, student, teacher)."""
    loss, grads = 0.0, []
    for j, (z, q) in enumerate(zip(logits.student.tolist(), logits.teacher.tolist(), strict=True)):

        def one(z, j=j, q=q):
            return WEIGHTS[j].item() * token_loss(j, z, q)

        loss += one(z)
        grads.append(naive.slope(one, z))
    return loss, torch.tensor(grads, dtype=torch.float64)


def assert_matches_loops(naive, logits, tokens, objective, token_loss):
    loss, grad, _ = loss_gradient_stats(objective, logits, tokens)
    expected, slopes = by_loops(naive, logits, token_loss)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert_close(grad, slopes, atol=1e-8, rtol=0)


@pytest.fixture
def tokens(tokens_of):
    return tokens_of(TOKEN, weights={"distil": WEIGHTS})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_vocabulary_support_matches_loops(naive, logits, tokens, divergence, temperature):
    def token_loss(_j, z, q):
        s, t = naive.softmax(z, temperature), naive.softmax(q, temperature)
        return naive.diverge(divergence.kind, SHARE.get(divergence.kind, 0), s, t)

    objective = objective_of(distil(divergence), temperature=temperature)
    assert_matches_loops(naive, logits, tokens, objective, token_loss)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("chosen_by", ["student", "teacher", "union"])
@pytest.mark.parametrize("remainder", ["tail_bucket", "renormalize", "renormalize_teacher", "drop"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_top_k_support_matches_loops(naive, logits, tokens, divergence, remainder, chosen_by, k):
    def token_loss(_j, z, q):
        s, t = naive.softmax(z), naive.softmax(q)
        pair = naive.cut(s, t, naive.chosen(s, t, k, chosen_by), remainder)
        return naive.diverge(divergence.kind, SHARE.get(divergence.kind, 0), *pair)

    support = TopKSupport(k=k, chosen_by=chosen_by, remainder=remainder)
    assert_matches_loops(naive, logits, tokens, objective_of(distil(divergence, support)), token_loss)


def test_sampled_token_support_matches_loops(naive, logits, tokens):
    detached = [naive.softmax(z) for z in logits.student.tolist()]  # the value under the stop-gradient

    def token_loss(j, z, q):
        y = TOKEN[j]
        weight = math.log(detached[j][y]) - math.log(naive.softmax(q)[y])
        return weight * math.log(naive.softmax(z)[y])

    objective = objective_of(distil(ReverseKl(), SampledTokenSupport()))
    assert_matches_loops(naive, logits, tokens, objective, token_loss)


def test_entry_and_log_ratio_bounds_match_loops(naive, logits, tokens):
    def token_loss(_j, z, q):
        total = 0.0
        for a, b in zip(naive.softmax(z), naive.softmax(q), strict=True):
            ratio = min(max(math.log(a) - math.log(b), -0.6), 0.5)
            total += min(-b * ratio, 0.04)
        return total

    clip = DivergenceClip(entry=0.04, log_ratio=(-0.6, 0.5))
    assert_matches_loops(naive, logits, tokens, objective_of(distil(ForwardKl(), clip=clip)), token_loss)


def test_token_bound_matches_loops_and_is_counted(naive, logits, tokens):
    token_losses = [
        naive.kl(naive.softmax(q), naive.softmax(z))
        for z, q in zip(logits.student.tolist(), logits.teacher.tolist(), strict=True)
    ]
    limit = sum(sorted(token_losses)[2:4]) / 2

    def token_loss(_j, z, q):
        return min(naive.kl(naive.softmax(q), naive.softmax(z)), limit)

    objective = objective_of(distil(ForwardKl(), clip=DivergenceClip(token=limit)))
    assert_matches_loops(naive, logits, tokens, objective, token_loss)
    stats = loss_gradient_stats(objective, logits, tokens)[2]
    over = sum(token_losses[j] > limit for j in (0, 2, 3, 4))
    assert stats["distil/token_clipped"].item() == over
    assert stats["distil/forward_kl"].item() == pytest.approx(sum(token_losses[j] for j in (0, 2, 3, 4)))


def test_log_ratio_bound_of_a_sampled_token_matches_loops(naive, logits, tokens):
    detached = [naive.softmax(z) for z in logits.student.tolist()]

    def token_loss(j, z, q):
        y = TOKEN[j]
        weight = math.log(detached[j][y]) - math.log(naive.softmax(q)[y])
        return min(max(weight, -0.3), 0.2) * math.log(naive.softmax(z)[y])

    clip = DivergenceClip(log_ratio=(-0.3, 0.2))
    objective = objective_of(distil(ReverseKl(), SampledTokenSupport(), clip=clip))
    assert_matches_loops(naive, logits, tokens, objective, token_loss)


def test_detached_weights_on_part_of_the_vocabulary(naive, logits, tokens):
    """The gradient of Σ_I sg(S (log S − log T)) log S."""
    support = TopKSupport(k=3, chosen_by="teacher", remainder="drop")
    objective = objective_of(distil(ReverseKl(detach_weights=True), support))
    loss, grad, _ = loss_gradient_stats(objective, logits, tokens)
    s, t = logits.student.log_softmax(-1), logits.teacher.log_softmax(-1)
    ids = t.topk(3).indices
    s, t = s.gather(-1, ids), t.gather(-1, ids)
    entries = (s.exp() * (s - t)).detach()
    by_hand = (WEIGHTS * (entries * s).sum(-1)).sum()
    assert_close(loss, (WEIGHTS * entries.sum(-1)).sum())
    assert_close(grad, *torch.autograd.grad(by_hand, logits.student))


def test_user_divergence_gets_both_sides_on_the_support(logits, tokens):
    def symmetric(student, teacher):
        absent = student.detach() == -torch.inf  # duplicates of the union, on both sides
        s, t = student.masked_fill(absent, 0.0), teacher.masked_fill(absent, 0.0)
        return ((s.exp() - t.exp()) * (s - t)).sum(-1) / 2

    support = TopKSupport(k=3, chosen_by="union", remainder="tail_bucket")
    losses = Table({"distil": distil(FileDivergence(file="mine.py", function="f"), support)})
    actual = loss_gradient_stats(Objective(losses, 1.0, {"distil": symmetric}), logits, tokens)
    expected = loss_gradient_stats(objective_of(distil(LinearMix(forward_share=0.5), support)), logits, tokens)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize(
    ("term", "place"),
    [
        (distil(Jsd(teacher_share=MOVES)), "distil.divergence.teacher_share"),
        (CrossEntropy(coefficient=MOVES), "distil.coefficient"),
        (PolicyGradient(advantage=GroupRelative(eps=MOVES)), "distil.advantage.eps"),
    ],
)
def test_schedule_without_a_step_is_an_error(term, place):
    with pytest.raises(TypeError, match=f"{place} is a schedule.*call at_step first"):
        objective_of(term)
    objective_of(at_step(term, 1))


def test_expected_sampled_token_gradient_is_that_of_the_reverse_kl(logits, tokens_of):
    """Enumerates the vocabulary: weight S_y for every y of one position."""
    student, teacher = logits.student[:1], logits.teacher[:1]
    weights = {"distil": student.softmax(-1).detach()[0]}
    tokens = tokens_of(range(7), weights=weights)
    surrogate = objective_of(distil(ReverseKl(), SampledTokenSupport()))
    loss, _ = surrogate(student.expand(7, 7), teacher.expand(7, 7), tokens)
    (grad,) = torch.autograd.grad(loss, logits.student, retain_graph=True)
    exact, _ = objective_of(distil(ReverseKl()))(student, teacher, tokens_of([0]))
    assert_close(grad, *torch.autograd.grad(exact, logits.student))


def test_cross_entropy_uses_temperature_one(naive, logits, tokens):
    def token_loss(j, z, _q):
        return -math.log(naive.softmax(z)[TOKEN[j]])

    assert_matches_loops(naive, logits, tokens, objective_of(CrossEntropy(), temperature=0.5), token_loss)


def test_temperature_of_a_term_overrides_the_sampling_temperature(logits, tokens):
    own = loss_gradient_stats(objective_of(distil(temperature=2.0), temperature=0.5), logits, tokens)
    inherited = loss_gradient_stats(objective_of(distil(), temperature=2.0), logits, tokens)
    assert own[0] == inherited[0]
    assert_close(own[1], inherited[1])


def test_terms_are_summed_with_their_coefficients(logits, tokens_of):
    weights = {"distil": WEIGHTS, "imitate": WEIGHTS.flip(0)}
    tokens = tokens_of(TOKEN, weights=weights)
    distillation, imitate = distil(Jsd()), CrossEntropy()
    both = objective_of(evolve(distillation, coefficient=2.0), imitate=evolve(imitate, coefficient=0.5))
    loss, grad, stats = loss_gradient_stats(both, logits, tokens)
    first = loss_gradient_stats(objective_of(distillation), logits, tokens)
    second = loss_gradient_stats(objective_of(imitate=imitate), logits, tokens)
    assert_close(loss, 2 * first[0] + 0.5 * second[0])
    assert_close(grad, 2 * first[1] + 0.5 * second[1])
    assert_close(stats["loss/distil"], 2 * first[0])
    assert_close(stats["loss/imitate"], 0.5 * second[0])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_uncounted_rows_and_row_order_change_nothing(logits, tokens_of, divergence):
    objective = objective_of(distil(divergence, importance=BOTH))
    extra = torch.tensor([[50.0, -1e30, 0, 0, 0, 0, -torch.inf]], dtype=torch.float64)
    finite = torch.zeros(1, 7, dtype=torch.float64)  # so the forward KL of this row is inf
    ratios = {"old_logprobs": OLD, "sampler_logprobs": SAMPLER}
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, **ratios)
    plain, grad, _ = loss_gradient_stats(objective, logits, tokens)

    student = torch.cat([logits.student.detach(), extra]).requires_grad_()
    teacher = torch.cat([logits.teacher, finite])
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    one = torch.zeros(1)
    tokens = tokens_of(
        torch.tensor([*TOKEN, 0])[order],
        weights={"distil": torch.cat([WEIGHTS, one])[order]},
        **{name: torch.cat([x, one])[order] for name, x in ratios.items()},
    )
    loss, _ = objective(student[order], teacher[order], tokens)
    (padded,) = torch.autograd.grad(loss, student)
    assert_close(loss.detach(), plain)
    assert_close(padded[:5], grad)
    assert_close(padded[5], torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_token_forbidden_on_both_sides_changes_nothing(logits, tokens, divergence):
    objective = objective_of(distil(divergence))
    plain, grad, _ = loss_gradient_stats(objective, logits, tokens)
    never = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    student = torch.cat([logits.student.detach(), never], -1).requires_grad_()
    loss, stats = objective(student, torch.cat([logits.teacher, never], -1), tokens)
    (wider,) = torch.autograd.grad(loss, student)
    assert_close(loss.detach(), plain)
    assert_close(wider[:, :7], grad)
    assert_close(wider[:, 7], torch.zeros(5, dtype=torch.float64))
    assert all(torch.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("support", [VocabularySupport(), SampledTokenSupport()], ids=name_of)
def test_uncounted_token_may_be_impossible_for_the_teacher(logits, tokens, support):
    """Token 1 has weight 0; the difference of the sides is infinite there."""
    objective = objective_of(distil(ReverseKl(), support))
    loss, grad, _ = loss_gradient_stats(objective, logits, tokens)
    teacher = logits.teacher.clone()
    teacher[1, TOKEN[1]] = -torch.inf
    other, stats = objective(logits.student, teacher, tokens)
    assert_close(other.detach(), loss)
    assert_close(torch.autograd.grad(other, logits.student)[0], grad)
    assert all(torch.isfinite(x) for x in stats.values())


def test_equal_sides_give_zero(logits, tokens):
    for support in (None, TopKSupport(k=3, chosen_by="union", remainder="tail_bucket")):
        for divergence in DIVERGENCES:
            objective = objective_of(distil(divergence, support))
            student = logits.student.detach()
            loss, _ = objective(logits.student, student, tokens)
            (grad,) = torch.autograd.grad(loss, logits.student)
            assert abs(loss.item()) < 1e-12
            assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_chunk_without_tokens_has_a_graph_and_every_metric(logits, tokens_of):
    terms = {
        "a": distil(importance=BOTH),
        "b": distil(ReverseKl(), TopKSupport(k=3, chosen_by="union", remainder="tail_bucket")),
        "c": distil(ReverseKl(), SampledTokenSupport()),
        "d": CrossEntropy(),
    }
    objective = objective_of(**terms)
    full = tokens_of(TOKEN, weights=dict.fromkeys(terms, WEIGHTS))
    loss, stats = objective(logits.student[:0], logits.teacher[:0], full.slice(0, 0))
    (grad,) = torch.autograd.grad(loss, logits.student)
    assert loss.item() == 0
    assert grad.abs().sum() == 0
    assert all(x == 0 for x in stats.values())
    assert stats.keys() == objective(logits.student, logits.teacher, full)[1].keys()


def test_low_precision_is_widened_and_no_argument_changes(logits, tokens_of):
    student = logits.student.detach().bfloat16().requires_grad_()
    teacher = logits.teacher.bfloat16()
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, old_logprobs=OLD, sampler_logprobs=SAMPLER)
    arguments = (student, teacher, tokens.token, WEIGHTS, OLD, SAMPLER)
    versions = [x._version for x in arguments]
    objective = objective_of(distil(Jsd(), importance=BOTH), temperature=0.9)
    loss, _ = objective(student, teacher, tokens)
    loss.backward()
    wide, _ = objective(student.float(), teacher.float(), tokens)
    assert loss.dtype == torch.float32
    assert loss == wide
    assert student.grad.dtype == torch.bfloat16
    assert [x._version for x in arguments] == versions


OLD = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.5])
SAMPLER = torch.tensor([-1.2, -2.5, -2.9, -0.5, -2.4])
BOTH = ImportanceSpec(old_policy=OldPolicyRatio(cap=1.5), sampler=SamplerRatio(cap=1.3, level="token"))
PER_SEQUENCE = ImportanceSpec(sampler=SamplerRatio(cap=1.3, level="sequence_mean"))


def at_tokens(p):
    return p.gather(-1, torch.tensor(TOKEN)[:, None]).squeeze(-1)


def test_importance_ratios_multiply_the_token_loss_as_constants(logits, tokens_of):
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, old_logprobs=OLD, sampler_logprobs=SAMPLER)
    loss, grad, stats = loss_gradient_stats(objective_of(distil(importance=BOTH)), logits, tokens)
    now = at_tokens(logits.student.detach().log_softmax(-1))
    first = (now - OLD).exp().clamp(max=1.5)
    second = (OLD - SAMPLER).exp().clamp(max=1.3)
    by_hand = tokens_of(TOKEN, weights={"distil": WEIGHTS * first * second})
    expected = loss_gradient_stats(objective_of(distil()), logits, by_hand)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1])
    counts = WEIGHTS > 0
    capped = ((now - OLD).exp() > 1.5) | ((OLD - SAMPLER).exp() > 1.3)
    assert_close(stats["distil/old_ratio"], first[counts].sum())
    assert_close(stats["distil/sampler_ratio"], second[counts].sum())
    assert stats["distil/ratio_capped"] == capped[counts].sum()
    assert 0 < stats["distil/ratio_capped"] < 4


def test_without_old_logprobs_the_sampler_ratio_uses_current_logprobs(logits, tokens_of):
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, sampler_logprobs=SAMPLER)
    loss, grad, _ = loss_gradient_stats(objective_of(distil(importance=BOTH)), logits, tokens)
    ratio = importance_ratio(at_tokens(logits.student.log_softmax(-1)), SAMPLER, 1.3)
    by_hand = tokens_of(TOKEN, weights={"distil": WEIGHTS * ratio})
    expected = loss_gradient_stats(objective_of(distil()), logits, by_hand)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1])


def test_ratios_use_the_sampling_temperature(logits, tokens_of):
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, sampler_logprobs=SAMPLER)
    importance = ImportanceSpec(sampler=SamplerRatio(cap=1.3, level="token"))
    term = distil(importance=importance, temperature=2.0)
    loss, _, _ = loss_gradient_stats(objective_of(term, temperature=0.5), logits, tokens)
    ratio = importance_ratio(at_tokens((logits.student / 0.5).log_softmax(-1)), SAMPLER, 1.3)
    by_hand = tokens_of(TOKEN, weights={"distil": WEIGHTS * ratio})
    expected = loss_gradient_stats(objective_of(distil(temperature=2.0)), logits, by_hand)
    assert_close(loss, expected[0])


@pytest.mark.parametrize("importance", [BOTH, PER_SEQUENCE])
def test_sampler_without_logprobs_is_not_corrected(logits, tokens, importance):
    loss, grad, stats = loss_gradient_stats(objective_of(distil(importance=importance)), logits, tokens)
    expected = loss_gradient_stats(objective_of(distil()), logits, tokens)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1])
    assert stats["distil/sampler_ratio"] == 4
    assert stats["distil/ratio_capped"] == 0


def test_golden_sequence_mean_ratio(tokens_of):
    old, sampler = torch.tensor([0.55, 0.9, 0.7]).log(), torch.tensor([0.5, 0.4, 0.2]).log()
    importance = ImportanceSpec(sampler=SamplerRatio(cap=2.0, level="sequence_mean"))
    tokens = tokens_of([0, 0, 0], sampler_logprobs=sampler)
    ratio = sampler_ratio(Table({"distil": distil(importance=importance)}), old, tokens, 1)
    assert_close(ratio, torch.full((3,), 1.7))


def test_sequence_mean_covers_the_terms_counted_tokens(tokens_of):
    losses = Table({"distil": distil(importance=PER_SEQUENCE), "other": CrossEntropy()})
    weights = {"distil": torch.tensor([0.0, 1, 1, 0, 1]), "other": torch.ones(5)}
    tokens = tokens_of(
        TOKEN,
        row=torch.tensor([0, 0, 0, 1, 3]),
        weights=weights,
        sampler_logprobs=torch.zeros(5),
        old_logprobs=torch.tensor([9.0, 0.5, 1.1, 9.0, 1.2]).log(),
    )
    ratio = sampler_ratio(losses, torch.zeros(5), tokens, 4)
    assert_close(ratio, torch.tensor([1.0, 0.8, 0.8, 1.0, 1.2]))
    assert ratio.dtype == torch.float32
    assert sampler_ratio(losses, torch.zeros(0), tokens.slice(0, 0), 0).shape == (0,)


def test_given_sequence_ratio_multiplies_the_token_loss(logits, tokens_of):
    ratio = torch.tensor([0.5, 0.5, 2.0, 2.0, 3.0])
    tokens = tokens_of(TOKEN, weights={"distil": WEIGHTS}, sampler_logprobs=SAMPLER, old_logprobs=OLD, ratio=ratio)
    objective = objective_of(distil(importance=PER_SEQUENCE))
    assert objective.needs_sequence_ratio
    loss, grad, _ = loss_gradient_stats(objective, logits, tokens)
    by_hand = tokens_of(TOKEN, weights={"distil": WEIGHTS * ratio})
    expected = loss_gradient_stats(objective_of(distil()), logits, by_hand)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1])


def test_missing_sequence_ratio_is_an_error(logits, tokens_of):
    tokens = tokens_of(TOKEN, sampler_logprobs=SAMPLER)
    with pytest.raises(ValueError, match=r"needs Tokens\.ratio"):
        loss_gradient_stats(objective_of(distil(importance=PER_SEQUENCE)), logits, tokens)


def test_metrics_of_a_top_k_term(naive, logits, tokens):
    support = TopKSupport(k=3, chosen_by="student", remainder="renormalize")
    objective = objective_of(distil(Jsd(teacher_share=0.5), support, coefficient=2.0))
    loss, _, stats = loss_gradient_stats(objective, logits, tokens)
    sums: defaultdict[str, float] = defaultdict(float)
    for j in (0, 2, 3, 4):
        s = naive.softmax(logits.student[j].tolist())
        t = naive.softmax(logits.teacher[j].tolist())
        ids = naive.top(s, 3)
        a, b = naive.cut(s, t, ids, "renormalize")
        sums["token_loss"] += naive.diverge("jsd", 0.5, a, b)
        sums["forward_kl"] += naive.kl(b, a)
        sums["reverse_kl"] += naive.kl(a, b)
        sums["k1"] += math.log(s[TOKEN[j]] / t[TOKEN[j]])
        sums["student_entropy"] -= sum(p * math.log(p) for p in s)
        sums["teacher_entropy"] -= sum(p * math.log(p) for p in t)
        sums["student_mass"] += sum(s[v] for v in ids)
        sums["teacher_mass"] += sum(t[v] for v in ids)
        sums["overlap"] += len(set(ids) & set(naive.top(t, 3))) / 3
    expected = {f"distil/{key}": value for key, value in sums.items()}
    expected |= {"distil/tokens": 4.0, "loss/distil": loss.item()}
    assert {key: x.item() for key, x in stats.items()} == pytest.approx(expected, abs=1e-6)
    assert all(x.shape == () and x.is_floating_point() for x in stats.values())
    assert not any(x.requires_grad for x in stats.values())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_both_kls_are_measured_for_any_divergence(logits, tokens, divergence):
    stats = loss_gradient_stats(objective_of(distil(divergence)), logits, tokens)[2]
    counts = WEIGHTS > 0
    s, t = logits.student.detach().log_softmax(-1), logits.teacher.log_softmax(-1)
    forward, reverse = (t.exp() * (t - s)).sum(-1), (s.exp() * (s - t)).sum(-1)
    assert_close(stats["distil/forward_kl"], forward[counts].sum())
    assert_close(stats["distil/reverse_kl"], reverse[counts].sum())


def test_metric_names_of_each_term(logits, tokens):
    def keys(term):
        stats = loss_gradient_stats(objective_of(term), logits, tokens)[2]
        return {key.removeprefix("distil/") for key in stats} - {"loss/distil"}

    common = {"tokens", "token_loss", "student_entropy"}
    assert keys(CrossEntropy()) == common
    sampled = common | {"teacher_entropy", "k1"}
    assert keys(distil(ReverseKl(), SampledTokenSupport())) == sampled
    vocabulary = sampled | {"forward_kl", "reverse_kl"}
    assert keys(distil()) == vocabulary
    ratios = {"old_ratio", "sampler_ratio", "ratio_capped"}
    assert keys(distil(importance=BOTH)) == vocabulary | ratios


def test_no_distribution_is_computed_twice(monkeypatch, logits, tokens_of):
    calls = []
    softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, *a: calls.append(x) or softmax(x, *a))
    weights = dict.fromkeys(["distil", "again", "hot", "imitate"], WEIGHTS)
    terms = {"again": distil(Jsd()), "hot": distil(temperature=2.0), "imitate": CrossEntropy()}
    objective = objective_of(distil(importance=BOTH), **terms)
    tokens = tokens_of(TOKEN, weights=weights)
    objective(logits.student, logits.teacher, tokens)
    assert len(calls) == 4  # two sides, two temperatures


@pytest.mark.parametrize(
    ("mask", "length", "expected"),
    [
        (MaskSpec(), 3, [0, 1, 2]),
        (MaskSpec(skip_first=2), 5, [2, 3, 4]),
        (MaskSpec(skip_first=2), 1, []),
        (MaskSpec(prefix=2), 5, [0, 1]),
        (MaskSpec(prefix=9), 2, [0, 1]),
        (MaskSpec(skip_first=1, prefix=3), 5, [1, 2]),
        (MaskSpec(skip_first=3, prefix=2), 5, []),
        (MaskSpec(), 0, []),
    ],
)
def test_unmasked_span(mask, length, expected):
    assert list(unmasked_span(mask, length)) == expected


def test_objective_states_its_needs():
    assert objective_of(distil()).needs_teacher
    assert not objective_of(CrossEntropy()).needs_teacher
    assert not objective_of(distil(importance=BOTH)).needs_sequence_ratio


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != ReverseKl()], ids=name_of)
def test_sampled_token_supports_only_the_reverse_kl(divergence):
    with pytest.raises(ValueError, match="distil: one sampled token can only estimate reverse_kl"):
        objective_of(distil(divergence, SampledTokenSupport()))


def test_at_most_one_term_has_a_sequence_ratio(tokens_of):
    term = distil(importance=PER_SEQUENCE)
    with pytest.raises(ValueError, match="only one term"):
        objective_of(term, again=term)
    with pytest.raises(ValueError, match="no term"):
        sampler_ratio(Table({"distil": distil()}), torch.zeros(1), tokens_of([0]), 1)


def test_missing_or_misshapen_teacher_is_an_error(logits, tokens):
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        objective_of(distil())(logits.student, None, tokens)
    with pytest.raises(ValueError, match=r"differ in shape: \(5, 7\) and \(5, 6\)"):
        objective_of(distil())(logits.student, logits.teacher[:, :6], tokens)


@pytest.mark.parametrize(
    ("term", "metric", "sign"),
    [
        (distil(Jsd()), "token_loss", 1),
        (distil(ReverseKl(), TopKSupport(k=3, chosen_by="student", remainder="tail_bucket")), "token_loss", 1),
        (distil(ReverseKl(), SampledTokenSupport()), "k1", 1),
        (PolicyGradient(advantage=LogRatio()), "advantage", -1),
    ],
    ids=["vocabulary", "top k", "sampled token", "log-ratio"],
)
def test_divergences_of_tokens_sum_to_the_metric(logits, tokens, term, metric, sign):
    objective = Objective(Table({"distil": term}), 1.0, per_token=True)
    _, stats = objective(logits.student, logits.teacher, tokens)
    values = stats.pop(TOKEN_DIVERGENCE)
    assert values.shape == WEIGHTS.shape
    assert not values.requires_grad
    assert values[1] == 0  # its weight is 0
    assert_close(values.sum(), sign * stats[f"distil/{metric}"])


def test_terms_without_a_teacher_have_no_divergence(logits, tokens):
    objective = Objective(Table({"distil": CrossEntropy()}), 1.0, per_token=True)
    assert TOKEN_DIVERGENCE not in objective(logits.student, None, tokens)[1]
