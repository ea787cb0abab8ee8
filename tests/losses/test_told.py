"""A teacher that told of a few ids: what can be computed is what a whole teacher gives, and the rest is refused."""

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
WHOLE_ALONE = {"distil/teacher_entropy"}
"""Figures of the teacher's whole distribution."""


def told_by(logits, token, k):
    """What a teacher with these logits tells: its k likeliest, and each token."""
    logprobs = logits.log_softmax(-1)
    kept = logprobs.topk(k)
    sampled = logprobs.gather(-1, torch.tensor(token)[:, None])[:, 0]
    return TopKLogprobs(ids=kept.indices, logprobs=kept.values, sampled=sampled)


def top(k, remainder="tail_bucket", by="teacher"):
    return TopKSupport(k=k, chosen_by=by, remainder=remainder)


def distil(support, divergence=None, **given):
    return Distillation(divergence=divergence or ForwardKl(), support=support, **given)


def figures(term, student, teacher, tokens, temperature=1.0):
    loss, stats = Objective(Table({"distil": term}), temperature)(student, teacher, tokens)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad, stats


def same(found, expected, missing):
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert expected[2].keys() - found[2].keys() == missing
    for name, value in found[2].items():
        assert_close(value, expected[2][name], msg=name)


@pytest.mark.parametrize("divergence", [ForwardKl(), ReverseKl(), Jsd(teacher_share=0.3)])
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("told_of", [3, 5])
def test_its_own_top_k_is_that_of_the_whole_teacher(logits, tokens_of, divergence, remainder, told_of):
    """In value, gradient and every figure; also where the server told of more tokens than the term takes."""
    term, tokens = distil(top(3, remainder), divergence), tokens_of(TOKEN)
    expected = figures(term, logits.student, logits.teacher, tokens)
    told = told_by(logits.teacher, TOKEN, told_of)
    same(figures(term, logits.student, told, tokens), expected, WHOLE_ALONE)


@pytest.mark.parametrize("remainder", ["renormalize", "renormalize_teacher"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rescaled_to_one_it_can_be_tempered_afterwards(logits, tokens_of, remainder, temperature):
    """softmax(log T / τ) over the k; nothing is said of the sampled token or the mass at τ."""
    term, tokens = distil(top(3, remainder)), tokens_of(TOKEN)
    expected = figures(term, logits.student, logits.teacher, tokens, temperature)
    told = told_by(logits.teacher, TOKEN, 3)
    found = figures(term, logits.student, told, tokens, temperature)
    same(found, expected, WHOLE_ALONE | {"distil/k1", "distil/teacher_mass"})


def test_two_tokens_by_hand(tokens_of):
    """Student ½, ¼, ¼; the teacher told of ¾ on id 1 and the sampled id 2 at ⅛: KL(T‖S) with a tail bucket."""
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    told = TopKLogprobs(
        ids=torch.tensor([[1]]), logprobs=torch.tensor([[0.75]]).log(), sampled=torch.tensor([0.125]).log()
    )
    loss, stats = Objective(Table({"distil": distil(top(1))}), 1.0)(student, told, tokens_of([2]))
    three, third = torch.tensor(3.0), torch.tensor(1 / 3)
    assert_close(loss, 0.75 * three.log() + 0.25 * third.log())
    assert_close(stats["distil/k1"], torch.tensor(2.0).log())
    assert_close(stats["distil/overlap"], torch.tensor(0.0))
    assert_close(stats["distil/teacher_mass"], torch.tensor(0.75))


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_an_id_that_the_student_has_not_is_part_of_the_remainder(logits, tokens_of, remainder):
    """The same as a teacher that told of one id less."""
    tokens = tokens_of(TOKEN)
    two = told_by(logits.teacher, TOKEN, 2)
    gap = TopKLogprobs(
        ids=torch.cat([two.ids, torch.zeros_like(two.ids[:, :1])], 1),
        logprobs=torch.cat([two.logprobs, torch.full_like(two.logprobs[:, :1], -torch.inf)], 1),
        sampled=two.sampled,
    )
    for divergence in (ForwardKl(), ReverseKl()):
        expected = figures(distil(top(2, remainder), divergence), logits.student, two, tokens)
        found = figures(distil(top(3, remainder), divergence), logits.student, gap, tokens)
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])


def test_the_sampled_token_and_the_log_ratio(logits, tokens_of):
    tokens = tokens_of(TOKEN, weights={"distil": torch.ones(5), "pull": torch.ones(5)})
    losses = Table(
        {"distil": distil(SampledTokenSupport(), ReverseKl()), "pull": PolicyGradient(advantage=LogRatio())}
    )
    expected = Objective(losses, 1.0)(logits.student, logits.teacher, tokens)
    found = Objective(losses, 1.0)(logits.student, told_by(logits.teacher, TOKEN, 0), tokens)
    assert_close(found[0], expected[0])
    slopes = [torch.autograd.grad(each[0], logits.student)[0] for each in (found, expected)]
    assert_close(*slopes)
    assert expected[1].keys() - found[1].keys() == WHOLE_ALONE


REFUSED = {
    "the whole vocabulary": (distil(VocabularySupport()), 1.0, "needs the teacher's logits"),
    "the student's choice": (distil(top(3, by="student")), 1.0, "not the student's top 3"),
    "more than was told": (distil(top(5)), 1.0, "own top 4, not the teacher's top 5"),
    "a tempered tail": (distil(top(3)), 2.0, "no tail_bucket at 2"),
    "a tempered drop": (distil(top(3, "drop")), 2.0, "no drop at 2"),
    "a tempered token": (distil(SampledTokenSupport(), ReverseKl()), 0.5, "at temperature 1, not 0.5"),
    "a tempered advantage": (PolicyGradient(advantage=LogRatio()), 0.5, "at temperature 1, not 0.5"),
}


@pytest.mark.parametrize(("term", "temperature", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_known_is_refused(logits, tokens_of, term, temperature, message):
    told = told_by(logits.teacher, TOKEN, 4)
    with pytest.raises(ValueError, match=message):
        Objective(Table({"distil": term}), temperature)(logits.student, told, tokens_of(TOKEN))


def test_a_users_divergence_sees_the_support(logits, tokens_of):
    seen = []

    def function(student, teacher):
        seen.append((student.exp().sum(-1), teacher.exp().sum(-1)))
        return (student - teacher).square().sum(-1)

    term = distil(top(3), FileDivergence(file="mine.py", function="f"))
    objective = Objective(Table({"distil": term}), 1.0, {"distil": function})
    objective(logits.student, told_by(logits.teacher, TOKEN, 3), tokens_of(TOKEN))
    for side in seen[0]:
        assert_close(side, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_a_narrowed_teacher_are_the_whole_one(problem_of, tokens_of, chunk):
    problem = problem_of([4, 2, 3])
    tokens = tokens_of(problem.token, row=problem.row, weights={"distil": torch.ones(9)})
    objective = Objective(Table({"distil": distil(top(4))}), 1.0)
    told = top_k_logprobs(problem.teacher, problem.token, 4, chunk)

    def run(teacher):
        loss, stats = projected_loss(problem.hidden, problem.head, teacher, tokens, objective, chunk)
        return loss.detach(), torch.autograd.grad(loss, (problem.hidden, problem.head)), stats

    found, expected = run(told), run(problem.teacher)
    assert_close(found[0], expected[0], check_dtype=False)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert expected[2].keys() - found[2].keys() == WHOLE_ALONE
    own = scored_logprobs(problem.teacher, problem.token, 1.0, chunk)
    assert_close(scored_logprobs(told, problem.token, 1.0, chunk), own)
    with pytest.raises(ValueError, match="temperature 1"):
        scored_logprobs(told, problem.token, 0.5, chunk)
    with pytest.raises(ValueError, match="has no logits"):
        logits_of(told, slice(0, 1))


def test_no_argument_changes(logits, tokens_of):
    told = told_by(logits.teacher, TOKEN, 3)
    given = (told.ids, told.logprobs, told.sampled)
    versions = [x._version for x in given]
    figures(distil(top(3)), logits.student, told, tokens_of(TOKEN))
    assert [x._version for x in given] == versions
