"""A teacher known by its top-k log-probabilities: losses equal those of the full distribution, or are refused."""

import pytest
import torch
from torch.testing import assert_close

from sdkit.batches import TopKLogprobs
from sdkit.language.specs import (
    Distillation,
    FileDivergence,
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
from sdkit.losses.chunks import projected_loss, scored_logprobs, top_k_logprobs
from sdkit.losses.objective import Objective
from sdkit.losses.scores import logits as logits_of

TOKEN = [3, 0, 6, 2, 2]
REMAINDERS = ("tail_bucket", "renormalize", "renormalize_teacher", "drop")
FULL_DISTRIBUTION_METRICS = {"distil/teacher_entropy"}
"""Metrics that need the teacher's full distribution."""


def top_k_of(logits, token, k):
    """`TopKLogprobs` of a teacher with these logits: its k likeliest tokens, and each token of `token`."""
    logprobs = logits.log_softmax(-1)
    top_k = logprobs.topk(k)
    sampled = logprobs.gather(-1, torch.tensor(token)[:, None])[:, 0]
    return TopKLogprobs(ids=top_k.indices, logprobs=top_k.values, sampled=sampled)


def top(k, remainder="tail_bucket", by="teacher"):
    return TopKSupport(k=k, chosen_by=by, remainder=remainder)


def distil(support, divergence=None, **settings):
    return Distillation(divergence=divergence or ForwardKl(), support=support, **settings)


def loss_gradient_stats(term, student, teacher, tokens, temperature=1.0):
    loss, stats = Objective(Table({"distil": term}), temperature)(student, teacher, tokens)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad, stats


def assert_same_results(actual, expected, missing):
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert expected[2].keys() - actual[2].keys() == missing
    for name, value in actual[2].items():
        assert_close(value, expected[2][name], msg=name)


@pytest.mark.parametrize("divergence", [ForwardKl(), ReverseKl(), Jsd(teacher_share=0.3)])
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("returned", [3, 5])
def test_own_top_k_matches_the_full_teacher(logits, tokens_of, divergence, remainder, returned):
    """Value, gradient and every metric; also if the server returned more tokens than the term uses."""
    term, tokens = distil(top(3, remainder), divergence), tokens_of(TOKEN)
    expected = loss_gradient_stats(term, logits.student, logits.teacher, tokens)
    scores = top_k_of(logits.teacher, TOKEN, returned)
    assert_same_results(loss_gradient_stats(term, logits.student, scores, tokens), expected, FULL_DISTRIBUTION_METRICS)


@pytest.mark.parametrize("remainder", ["renormalize", "renormalize_teacher"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_renormalized_top_k_can_be_tempered(logits, tokens_of, remainder, temperature):
    """softmax(log T / τ) over the k tokens; the sampled token's probability and the mass at τ are unknown."""
    term, tokens = distil(top(3, remainder)), tokens_of(TOKEN)
    expected = loss_gradient_stats(term, logits.student, logits.teacher, tokens, temperature)
    scores = top_k_of(logits.teacher, TOKEN, 3)
    actual = loss_gradient_stats(term, logits.student, scores, tokens, temperature)
    assert_same_results(actual, expected, FULL_DISTRIBUTION_METRICS | {"distil/k1", "distil/teacher_mass"})


def test_two_tokens_by_hand(tokens_of):
    """Student ½, ¼, ¼; the teacher has ¾ on id 1 and ⅛ on the sampled id 2: KL(T‖S) with a tail bucket."""
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    scores = TopKLogprobs(
        ids=torch.tensor([[1]]), logprobs=torch.tensor([[0.75]]).log(), sampled=torch.tensor([0.125]).log()
    )
    loss, stats = Objective(Table({"distil": distil(top(1))}), 1.0)(student, scores, tokens_of([2]))
    three, third = torch.tensor(3.0), torch.tensor(1 / 3)
    assert_close(loss, 0.75 * three.log() + 0.25 * third.log())
    assert_close(stats["distil/k1"], torch.tensor(2.0).log())
    assert_close(stats["distil/overlap"], torch.tensor(0.0))
    assert_close(stats["distil/teacher_mass"], torch.tensor(0.75))


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_id_that_the_student_lacks_goes_to_the_remainder(logits, tokens_of, remainder):
    """It counts like a teacher that returned one id less."""
    tokens = tokens_of(TOKEN)
    two_ids = top_k_of(logits.teacher, TOKEN, 2)
    with_missing_id = TopKLogprobs(
        ids=torch.cat([two_ids.ids, torch.zeros_like(two_ids.ids[:, :1])], 1),
        logprobs=torch.cat([two_ids.logprobs, torch.full_like(two_ids.logprobs[:, :1], -torch.inf)], 1),
        sampled=two_ids.sampled,
    )
    for divergence in (ForwardKl(), ReverseKl()):
        expected = loss_gradient_stats(distil(top(2, remainder), divergence), logits.student, two_ids, tokens)
        actual = loss_gradient_stats(distil(top(3, remainder), divergence), logits.student, with_missing_id, tokens)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1])


def test_sampled_token_and_log_ratio_match_the_full_teacher(logits, tokens_of):
    tokens = tokens_of(TOKEN, weights={"distil": torch.ones(5), "pull": torch.ones(5)})
    losses = Table(
        {"distil": distil(SampledTokenSupport(), ReverseKl()), "pull": PolicyGradient(advantage=LogRatio())}
    )
    expected = Objective(losses, 1.0)(logits.student, logits.teacher, tokens)
    actual = Objective(losses, 1.0)(logits.student, top_k_of(logits.teacher, TOKEN, 0), tokens)
    assert_close(actual[0], expected[0])
    slopes = [torch.autograd.grad(result[0], logits.student)[0] for result in (actual, expected)]
    assert_close(*slopes)
    assert expected[1].keys() - actual[1].keys() == FULL_DISTRIBUTION_METRICS


REFUSED = {
    "the full vocabulary": (distil(VocabularySupport()), 1.0, "needs the teacher's logits"),
    "the student's choice": (distil(top(3, by="student")), 1.0, "not the student's top 3"),
    "more than was returned": (distil(top(5)), 1.0, "own top 4, not the teacher's top 5"),
    "a tempered tail": (distil(top(3)), 2.0, "no tail_bucket at 2"),
    "a tempered drop": (distil(top(3, "drop")), 2.0, "no drop at 2"),
    "a tempered token": (distil(SampledTokenSupport(), ReverseKl()), 0.5, "at temperature 1, not 0.5"),
    "a tempered advantage": (PolicyGradient(advantage=LogRatio()), 0.5, "at temperature 1, not 0.5"),
}


@pytest.mark.parametrize(("term", "temperature", "message"), REFUSED.values(), ids=REFUSED)
def test_unknown_quantity_is_refused(logits, tokens_of, term, temperature, message):
    scores = top_k_of(logits.teacher, TOKEN, 4)
    with pytest.raises(ValueError, match=message):
        Objective(Table({"distil": term}), temperature)(logits.student, scores, tokens_of(TOKEN))


def test_user_divergence_gets_the_support(logits, tokens_of):
    masses = []

    def function(student, teacher):
        masses.append((student.exp().sum(-1), teacher.exp().sum(-1)))
        return (student - teacher).square().sum(-1)

    term = distil(top(3), FileDivergence(file="mine.py", function="f"))
    objective = Objective(Table({"distil": term}), 1.0, {"distil": function})
    objective(logits.student, top_k_of(logits.teacher, TOKEN, 3), tokens_of(TOKEN))
    for side in masses[0]:
        assert_close(side, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_top_k_scores_match_the_full_teacher(problem_of, tokens_of, chunk):
    problem = problem_of([4, 2, 3])
    tokens = tokens_of(problem.token, row=problem.row, weights={"distil": torch.ones(9)})
    objective = Objective(Table({"distil": distil(top(4))}), 1.0)
    scores = top_k_logprobs(problem.teacher, problem.token, 4, chunk)

    def run(teacher):
        loss, stats = projected_loss(problem.hidden, problem.head, teacher, tokens, objective, chunk)
        return loss.detach(), torch.autograd.grad(loss, (problem.hidden, problem.head)), stats

    actual, expected = run(scores), run(problem.teacher)
    assert_close(actual[0], expected[0], check_dtype=False)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert expected[2].keys() - actual[2].keys() == FULL_DISTRIBUTION_METRICS
    expected_logprobs = scored_logprobs(problem.teacher, problem.token, 1.0, chunk)
    assert_close(scored_logprobs(scores, problem.token, 1.0, chunk), expected_logprobs)
    with pytest.raises(ValueError, match="temperature 1"):
        scored_logprobs(scores, problem.token, 0.5, chunk)
    with pytest.raises(ValueError, match="has no logits"):
        logits_of(scores, slice(0, 1))


def test_no_argument_changes(logits, tokens_of):
    scores = top_k_of(logits.teacher, TOKEN, 3)
    arguments = (scores.ids, scores.logprobs, scores.sampled)
    versions = [x._version for x in arguments]
    loss_gradient_stats(distil(top(3)), logits.student, scores, tokens_of(TOKEN))
    assert [x._version for x in arguments] == versions
