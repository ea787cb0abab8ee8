"""Blended teachers: Q ∝ Π part^factor against plain loops, through the chunks, and as an advantage."""

import math

import pytest
import torch
from attrs import evolve
from torch.testing import assert_close

from sdkit.batches import BlendedScores, HiddenStateScores, RoutedScores, Tokens
from sdkit.language.specs import (
    Distillation,
    ForwardKl,
    Jsd,
    LogRatio,
    PolicyGradient,
    ReverseKl,
    SampledTokenSupport,
    Table,
    TopKSupport,
    VocabularySupport,
)
from sdkit.losses.chunks import projected_loss, token_logprobs, token_logprobs_and_entropy
from sdkit.losses.objective import Objective
from sdkit.losses.policy_terms import sequence_means
from sdkit.losses.scores import logits as logits_of

FACTORS = {"trust region": (0.99, 0.01), "product": (1.0, 0.8), "geometric": (0.5, 0.5), "extrapolate": (1.25, -0.25)}
EVERY_BLEND = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
ALL = slice(None)


def scores_of(logits):
    """Scores whose logits are these, [M, V]."""
    return HiddenStateScores(hidden=logits, head=torch.eye(logits.shape[-1], dtype=logits.dtype))


def blend_scores(factors, *parts):
    return BlendedScores(parts=parts, factors=factors)


def normalized_product(factors, *distributions):
    """Π p^factor, normalised: plain floats."""
    products = [
        math.prod(p**f for p, f in zip(column, factors, strict=True)) for column in zip(*distributions, strict=True)
    ]
    return [x / sum(products) for x in products]


def test_golden_product(pair):
    """Veto (arXiv 2601.07155) at 0.8."""
    scores = blend_scores((1.0, 0.8), scores_of(pair.teacher[None]), scores_of(pair.student.detach()[None]))
    golden = [-0.906503, -0.706503, -3.106503, -3.006503, -4.806503, -8.106503]
    expected = torch.tensor([golden], dtype=torch.float64)
    assert_close(logits_of(scores, ALL).log_softmax(-1), expected, atol=1e-6, rtol=0)


def test_blend_by_hand():
    """(1/2)^2 : (1/2)^2 against (4/5)^-1 : (1/5)^-1 is 5/4 : 5."""
    even, odd = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    blend = logits_of(blend_scores((2.0, -1.0), scores_of(even), scores_of(odd)), ALL).softmax(-1)
    assert_close(blend, torch.tensor([[0.2, 0.8]]))


@EVERY_BLEND
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_value_and_gradient_match_the_normalized_product(logits, naive, tokens_of, factors, temperature, name):
    """The product is taken of distributions at the temperature; the blend of logits is tempered afterwards."""
    divergence = {"forward_kl": ForwardKl(), "reverse_kl": ReverseKl()}[name]
    term = Distillation(divergence=divergence, support=VocabularySupport(), temperature=temperature)
    # The partner is the student itself; the gradient treats it as a constant.
    scores = blend_scores(factors, scores_of(logits.teacher), scores_of(logits.student))
    head = torch.eye(7, dtype=torch.float64)
    objective = Objective(Table({"distil": term}), 1.0)
    loss, _ = projected_loss(logits.student, head, scores, tokens_of([0] * 5), objective, 2)
    (slope,) = torch.autograd.grad(loss, logits.student)
    total = 0.0
    for row, (z_s, z_t) in enumerate(zip(logits.student.tolist(), logits.teacher.tolist(), strict=True)):
        sides = [naive.softmax(z, temperature) for z in (z_t, z_s)]
        q = normalized_product(factors, *sides)

        def of_student(z, q=q):
            return naive.diverge(name, 0.0, naive.softmax(z, temperature), q)

        total += of_student(z_s)
        expected = torch.tensor(naive.slope(of_student, z_s), dtype=torch.float64)
        assert_close(slope[row], expected, atol=1e-8, rtol=0)
    assert loss.item() == pytest.approx(total, abs=1e-10)


@EVERY_BLEND
@pytest.mark.parametrize("by", ["student", "teacher", "union"])
def test_support_is_chosen_from_the_blend(logits, naive, tokens_of, factors, by):
    support = TopKSupport(k=2, chosen_by=by, remainder="tail_bucket")
    losses = Table({"distil": Distillation(divergence=Jsd(teacher_share=0.3), support=support)})
    other = logits.student.detach().flip(0)
    loss, _ = projected_loss(
        logits.student.detach(),
        torch.eye(7, dtype=torch.float64),
        blend_scores(factors, scores_of(logits.teacher), scores_of(other)),
        tokens_of([0] * 5),
        Objective(losses, 1.0),
        100,
    )
    total = 0.0
    for z_s, z_t, z_o in zip(*(x.tolist() for x in (logits.student, logits.teacher, other)), strict=True):
        p, q = naive.softmax(z_s), normalized_product(factors, naive.softmax(z_t), naive.softmax(z_o))
        cut = naive.cut(p, q, naive.chosen(p, q, 2, by), "tail_bucket")
        total += naive.diverge("jsd", 0.3, *cut)
    assert loss.item() == pytest.approx(total, abs=1e-10)


@EVERY_BLEND
def test_entropy_and_log_probability_are_those_of_the_blend(logits, naive, factors):
    scores = blend_scores(factors, scores_of(logits.teacher), scores_of(logits.student.detach()))
    token = torch.tensor([3, 0, 6, 2, 2])
    logprobs, entropies = token_logprobs_and_entropy(scores, token, 0.7, 2)
    for row, (z_t, z_s) in enumerate(zip(logits.teacher.tolist(), logits.student.tolist(), strict=True)):
        q = normalized_product(factors, *(naive.softmax(z, 0.7) for z in (z_t, z_s)))
        assert logprobs[row].item() == pytest.approx(math.log(q[token[row]]), abs=1e-5)
        assert entropies[row].item() == pytest.approx(-sum(x * math.log(x) for x in q), abs=1e-5)


def terms():
    return Table(
        {
            "distil": Distillation(divergence=ForwardKl(), support=VocabularySupport()),
            "seek": Distillation(divergence=ReverseKl(), support=SampledTokenSupport()),
            "pull": PolicyGradient(advantage=LogRatio(center="sequence")),
        }
    )


def loss_in_chunks(problem, scores, chunk):
    """Loss, gradients of hidden states and head, and metric sums."""
    losses = terms()
    tokens_in = len(problem.token)
    hidden, head = (x.detach().clone().requires_grad_() for x in (problem.hidden, problem.head))
    tokens = Tokens(
        token=problem.token,
        row=problem.row,
        weights=dict.fromkeys(losses, torch.full((tokens_in,), 1 / tokens_in)),
        sampler_logprobs=None,
        old_logprobs=problem.old_logprobs,
    )
    student_logprobs = token_logprobs(hidden, head, tokens.token, 1.0, chunk)
    teacher_logprobs, _ = token_logprobs_and_entropy(scores, tokens.token, 1.0, chunk)
    means = sequence_means(losses, student_logprobs, teacher_logprobs, tokens, len(problem.lengths))
    tokens = evolve(tokens, sequence_means=means)
    loss, stats = projected_loss(hidden, head, scores, tokens, Objective(losses, 1.0), chunk)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, stats


@pytest.mark.parametrize("routed", [False, True], ids=["one teacher", "routed"])
@EVERY_BLEND
def test_chunk_size_changes_nothing(problem_of, factors, routed):
    problem = problem_of([4, 2, 1, 0, 3])
    teacher = problem.teacher
    if routed:  # even rows have one teacher, odd ones another
        part = problem.row % 2
        place = torch.empty_like(part)
        parts = []
        for i, head in enumerate((teacher.head, -teacher.head)):
            place[part == i] = torch.arange(int((part == i).sum()))
            parts.append(HiddenStateScores(hidden=teacher.hidden[part == i], head=head))
        teacher = RoutedScores(parts=tuple(parts), part=part, place=place, vocabulary=13)
    scores = blend_scores(factors, teacher, problem.reference)
    in_one_chunk = loss_in_chunks(problem, scores, 100)
    assert in_one_chunk[1].abs().max() > 0
    for chunk in (1, 3, 10):
        assert_close(loss_in_chunks(problem, scores, chunk), in_one_chunk)


def test_parts_are_widened_before_the_sum():
    """1.25 · 258 − 0.25 · 256 = 258.5 is not representable in bfloat16."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    parts = [HiddenStateScores(hidden=one, head=torch.tensor([[x]], dtype=torch.bfloat16)) for x in (258.0, 256.0)]
    blend = logits_of(blend_scores((1.25, -0.25), *parts), ALL)
    assert blend.dtype == torch.float32
    assert blend.item() == 258.5


@EVERY_BLEND
def test_token_excluded_by_a_part_stays_excluded(tokens_of, factors):
    never = -math.inf
    parts = torch.tensor([[never, 1.0, 0.0, never]]), torch.tensor([[0.5, never, 0.0, never]])
    scores = blend_scores(factors, *map(scores_with_infinities, parts))
    blend = logits_of(scores, ALL)
    assert_close(blend, torch.tensor([[never, never, 0.0, never]]))
    student = torch.zeros(1, 4, requires_grad=True)
    term = Distillation(divergence=ForwardKl(), support=VocabularySupport())
    loss, _ = Objective(Table({"distil": term}), 1.0)(student, blend, tokens_of([0]))
    (slope,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(math.log(4))
    assert_close(slope, torch.tensor([[0.25, 0.25, -0.75, 0.25]]))


def scores_with_infinities(logits):
    """One token's scores with -inf among them: a hidden state of one number, its logits as the head."""
    return HiddenStateScores(hidden=torch.ones(1, 1), head=logits.T)


@pytest.fixture
def expected_gradient(logits, tokens_of):
    """Gradient of the policy gradient over all tokens of one state, each weighed by its probability."""

    def gradient(scores, advantage):
        student = logits.student.detach()[:1].clone().requires_grad_()
        chances = student.detach().softmax(-1)[0]
        tokens = tokens_of(torch.arange(7), weights={"pull": chances})
        term = PolicyGradient(advantage=advantage)
        every = student.expand(7, 7)
        teacher = logits_of(scores, ALL).expand(7, 7)
        loss, _ = Objective(Table({"pull": term}), 1.0)(every, teacher, tokens)
        return torch.autograd.grad(loss, student)[0][0]

    return gradient


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 3.0])
def test_normalizer_is_a_baseline(logits, expected_gradient, factor):
    """E[A ∇log S] over all tokens with A = f (log T − log B) − (log S − log B), which lacks the normalizer."""
    teacher, base = logits.teacher[:1], logits.teacher[1:2]
    scores = blend_scores((factor, 1 - factor), scores_of(teacher), scores_of(base))
    actual = expected_gradient(scores, LogRatio())
    student = logits.student.detach()[:1].clone().requires_grad_()
    s, t, b = (x.log_softmax(-1) for x in (student, teacher, base))
    advantage = (factor * (t - b) - (s - b)).detach()
    expected = torch.autograd.grad(-(s.exp().detach() * advantage * s).sum(), student)[0][0]
    assert_close(actual, expected)
    log_normaliser = (factor * t + (1 - factor) * b).logsumexp(-1)
    assert (log_normaliser.abs() > 0.05) == (factor != 1.0)


@EVERY_BLEND
def test_expected_gradient_is_that_of_the_reverse_kl_to_the_blend(logits, expected_gradient, factors):
    scores = blend_scores(factors, scores_of(logits.teacher[:1]), scores_of(logits.teacher[1:2]))
    student = logits.student.detach()[:1].clone().requires_grad_()
    s, q = student.log_softmax(-1), logits_of(scores, ALL).log_softmax(-1)
    expected = torch.autograd.grad((s.exp() * (s - q)).sum(), student)[0][0]
    assert_close(expected_gradient(scores, LogRatio()), expected)


def test_normalizer_counts_where_a_floor_binds(logits, expected_gradient):
    """The floor applies to log Q − log S, which includes the normalizer."""
    teacher, base = logits.teacher[:1], logits.teacher[1:2]
    scores = blend_scores((3.0, -2.0), scores_of(teacher), scores_of(base))
    actual = expected_gradient(scores, LogRatio(floor=-1.0))
    student = logits.student.detach()[:1].clone().requires_grad_()
    s, t, b = (x.log_softmax(-1) for x in (student, teacher, base))

    def slope(log_q):
        advantage = (log_q - s).detach().clamp(min=-1.0)
        return torch.autograd.grad(-(s.exp().detach() * advantage * s).sum(), student, retain_graph=True)[0][0]

    assert_close(actual, slope((3 * t - 2 * b).log_softmax(-1)))
    assert (actual - slope(3 * t - 2 * b)).abs().max() > 0.01
