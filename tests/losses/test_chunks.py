import pytest
import torch
from attrs import evolve
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from sdkit.batches import HiddenStateScores, LogitTransform, Tokens
from sdkit.language.specs import (
    ClipSpec,
    Constant,
    CrossEntropy,
    Distillation,
    ForwardKl,
    GroupRelative,
    ImportanceSpec,
    Jsd,
    LogRatio,
    OldPolicyRatio,
    PerSequence,
    PerToken,
    PolicyGradient,
    PolicyImportance,
    ReferenceKl,
    ReverseKl,
    SampledTokenSupport,
    SamplerRatio,
    SequenceSum,
    Sum,
    Table,
    TopKSupport,
    VocabularySupport,
)
from sdkit.losses import chunks
from sdkit.losses.chunks import projected_loss, token_logprobs
from sdkit.losses.objective import Objective, row_weights, sampler_ratio
from sdkit.losses.policy_terms import sequence_means

AVERAGES = [
    PerToken(),
    PerSequence(empty_rows="skip"),
    PerSequence(empty_rows="count"),
    SequenceSum(),
    Constant(length=4.0),
    Sum(),
]
LENGTHS = [4, 2, 1, 0, 3, 1, 5, 2]


def terms_of(average):
    return Table(
        {
            "distil": Distillation(
                divergence=Jsd(),
                support=TopKSupport(k=4, chosen_by="union", remainder="tail_bucket"),
                temperature=0.8,
                importance=ImportanceSpec(
                    old_policy=OldPolicyRatio(cap=1.5), sampler=SamplerRatio(cap=2.0, level="sequence_mean")
                ),
                average=average,
            ),
            "cover": Distillation(
                divergence=ForwardKl(), support=VocabularySupport(), average=average, coefficient=0.5
            ),
            "seek": Distillation(
                divergence=ReverseKl(), support=SampledTokenSupport(), average=average, coefficient=0.3
            ),
            "imitate": CrossEntropy(average=average, coefficient=0.2),
            "pull": PolicyGradient(
                advantage=GroupRelative(),
                ratio="sequence",
                clip=ClipSpec(low=0.5, high=2.0, dual=3.0),
                average=average,
                coefficient=0.7,
            ),
            "teach": PolicyGradient(
                advantage=LogRatio(center="sequence", floor=-1.0),
                clip=ClipSpec(low=0.2, high=0.3),
                importance=PolicyImportance(sampler=SamplerRatio(cap=1.5, level="token")),
                average=average,
                coefficient=0.4,
            ),
            "stay": ReferenceKl(estimator="k2", average=average, coefficient=0.1),
            "near": ReferenceKl(estimator="vocabulary", average=average, coefficient=0.6),
        }
    )


def with_sequence_statistics(losses, tokens, rows, student, teacher, chunk=100):
    """Adds the statistics of full sequences; student and teacher are pairs of hidden states and head."""
    student_logprobs, teacher_logprobs = (token_logprobs(*x, tokens.token, 1.0, chunk) for x in (student, teacher))
    unread = torch.full_like(student_logprobs, torch.nan)  # old_logprobs are given
    return evolve(
        tokens,
        ratio=sampler_ratio(losses, unread, tokens, rows),
        sequence_means=sequence_means(losses, student_logprobs, teacher_logprobs, tokens, rows),
    )


def hidden_and_head(scores):
    return scores.hidden, scores.head


def select_tokens(scores, pick):
    return HiddenStateScores(hidden=scores.hidden[pick], head=scores.head)


def chunked_loss(problem, rows=None, average=None, chunk=100):
    """Loss, gradients of the rows' hidden states and of the head, and metric sums; counts stay global."""
    losses = terms_of(average or PerSequence(empty_rows="count"))
    rows = list(range(len(problem.lengths))) if rows is None else rows
    pick = torch.cat([torch.nonzero(problem.row == r).flatten() for r in rows])
    lengths = problem.lengths[rows]
    row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    hidden = problem.hidden.detach()[pick].requires_grad_(problem.hidden.requires_grad)
    head = problem.head.detach().clone().requires_grad_(problem.head.requires_grad)
    tokens = Tokens(
        token=problem.token[pick],
        row=row,
        weights={n: row_weights(t.average, lengths, problem.counts)[row] for n, t in losses.items()},
        sampler_logprobs=problem.sampler_logprobs[pick],
        old_logprobs=problem.old_logprobs[pick],
        advantages=problem.advantages[pick],
    )
    teacher, reference = select_tokens(problem.teacher, pick), select_tokens(problem.reference, pick)
    tokens = with_sequence_statistics(losses, tokens, len(rows), (hidden, head), hidden_and_head(teacher), chunk)
    objective = Objective(losses, 1.0)
    loss, stats = projected_loss(hidden, head, teacher, tokens, objective, chunk, reference)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), hidden.grad, head.grad, stats


def dense_loss(problem, losses):
    """The same loss with plain autograd through [M, V]."""
    hidden = problem.hidden.detach().clone().requires_grad_()
    head = problem.head.detach().clone().requires_grad_()
    weights = {n: row_weights(t.average, problem.lengths, problem.counts)[problem.row] for n, t in losses.items()}
    fields = {
        "token": problem.token,
        "row": problem.row,
        "weights": weights,
        "sampler_logprobs": problem.sampler_logprobs,
        "old_logprobs": problem.old_logprobs,
        "advantages": problem.advantages,
    }
    tokens = with_sequence_statistics(
        losses, Tokens(**fields), len(problem.lengths), (hidden, head), hidden_and_head(problem.teacher)
    )
    scores, reference = (x.hidden @ x.head.T for x in (problem.teacher, problem.reference))
    loss, stats = Objective(losses, 1.0)(hidden @ head.T, scores, tokens, reference)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, stats


def assert_all_close(left, right, **close):
    for a, b in zip(left, right, strict=True):
        assert_close(a, b, **close)


@pytest.mark.parametrize("block_bytes", [1, 2 * 13 * 4, chunks.BLOCK_BYTES])
@pytest.mark.parametrize("chunk", [1, 3, 18, 1000])
def test_any_chunk_and_block_size_matches_plain_autograd(problem_of, chunk, block_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", block_bytes)
    problem = problem_of(LENGTHS)
    assert_all_close(
        chunked_loss(problem, chunk=chunk), dense_loss(problem, terms_of(PerSequence(empty_rows="count")))
    )


@pytest.mark.parametrize("average", AVERAGES, ids=lambda a: a.kind)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4], [5, 6, 7]], [[r] for r in range(8)]])
def test_micro_batches_add_up_to_one_batch(problem_of, average, parts):
    """5 + 3 rows, and one row at a time (one of them empty), against all 8."""
    problem = problem_of(LENGTHS)
    loss, grad_hidden, grad_head, stats = chunked_loss(problem, average=average)
    shares = [chunked_loss(problem, rows, average, chunk=2) for rows in parts]
    assert_close(sum(s[0] for s in shares), loss)
    assert_close(torch.cat([s[1] for s in shares]), grad_hidden)
    assert_close(sum(s[2] for s in shares), grad_head)
    for name, total in stats.items():
        assert_close(sum(s[3][name] for s in shares), total)


@pytest.mark.parametrize("average", AVERAGES, ids=lambda a: a.kind)
def test_row_order_changes_nothing(problem_of, average):
    problem = problem_of(LENGTHS)
    loss, _, grad_head, _ = chunked_loss(problem, average=average)
    shuffled, _, shuffled_head, _ = chunked_loss(problem, rows=[6, 1, 0, 7, 3, 5, 2, 4], average=average)
    assert_close(shuffled, loss)
    assert_close(shuffled_head, grad_head)


def test_empty_row_gives_a_zero_loss_with_a_graph(problem_of):
    loss, grad_hidden, grad_head, stats = chunked_loss(problem_of(LENGTHS), rows=[3])  # an empty row
    assert loss == 0
    assert grad_hidden.shape == (0, 5)
    assert_close(grad_head, torch.zeros_like(grad_head))
    assert stats.keys() == chunked_loss(problem_of(LENGTHS))[3].keys()
    assert all(x == 0 for x in stats.values())


def test_no_rows_give_a_zero_loss_with_a_graph(problem_of):
    problem = problem_of([2])
    hidden = problem.hidden.detach()[:0].requires_grad_()
    none = torch.zeros(0)
    tokens = Tokens(
        token=problem.token[:0],
        row=problem.row[:0],
        weights=dict.fromkeys(terms_of(Sum()), none),
        sampler_logprobs=none,
        old_logprobs=none,
        advantages=none,
    )
    teacher, reference = (select_tokens(x, slice(0)) for x in (problem.teacher, problem.reference))
    losses = terms_of(PerToken())
    tokens = with_sequence_statistics(losses, tokens, 0, (hidden, problem.head), hidden_and_head(teacher))
    loss, _ = projected_loss(hidden, problem.head, teacher, tokens, Objective(losses, 1.0), 8, reference)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, 5)
    assert_close(problem.head.grad, torch.zeros_like(problem.head))


def test_backward_scales_with_the_upstream_gradient(problem_of):
    problem = problem_of([3, 2])
    losses = Table({"imitate": CrossEntropy(average=Sum())})
    tokens = Tokens(
        token=problem.token,
        row=problem.row,
        weights={"imitate": torch.ones(5)},
        sampler_logprobs=None,
        old_logprobs=None,
    )
    objective = Objective(losses, 1.0)

    def grads(scale):
        loss, _ = projected_loss(problem.hidden, problem.head, None, tokens, objective, 2)
        return torch.autograd.grad(scale * loss, [problem.hidden, problem.head])

    assert_all_close(grads(4.0), [4 * g for g in grads(1.0)])


def test_without_grad_mode_only_values_are_computed(problem_of):
    problem = problem_of(LENGTHS)
    with torch.no_grad():
        loss, *_, stats = chunked_loss(problem)
    expected = chunked_loss(problem)
    assert_close(loss, expected[0])
    assert_close(stats, expected[3])
    problem.hidden.requires_grad_(False)
    problem.head.requires_grad_(False)
    assert_close(chunked_loss(problem)[0], loss)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_input_leaves_the_other_gradient(problem_of, frozen):
    problem = problem_of(LENGTHS)
    expected = chunked_loss(problem, chunk=3)
    getattr(problem, frozen).requires_grad_(False)
    loss, grad_hidden, grad_head, _ = chunked_loss(problem, chunk=3)
    assert_close(loss, expected[0])
    if frozen == "hidden":
        assert grad_hidden is None
        assert_close(grad_head, expected[2])
    else:
        assert grad_head is None
        assert_close(grad_hidden, expected[1])


def test_bfloat16_logits_are_projected_in_bfloat16_and_widened(problem_of):
    problem = problem_of(LENGTHS, torch.bfloat16)
    loss, grad_hidden, grad_head, _ = chunked_loss(problem)
    expected = dense_loss(problem, terms_of(PerSequence(empty_rows="count")))
    assert (loss.dtype, grad_hidden.dtype, grad_head.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert_all_close((loss, grad_hidden, grad_head), expected[:3])


def test_head_gradient_is_summed_in_float32():
    """300 tokens contribute ½ each: 150.  A sum in bfloat16 would stop at 128."""
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(300, 1, dtype=torch.bfloat16)
    tokens = Tokens(
        token=torch.zeros(300, dtype=torch.long),
        row=torch.zeros(300, dtype=torch.long),
        weights={"imitate": torch.ones(300)},
        sampler_logprobs=None,
        old_logprobs=None,
    )
    objective = Objective(Table({"imitate": CrossEntropy()}), 1.0)
    loss, _ = projected_loss(hidden, head, None, tokens, objective, 1)
    loss.backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-150.0, 150.0]


class Sizes(TorchFunctionMode):
    """Records the number of elements of the largest tensor that a call creates."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize(("chunk", "fits"), [(3, True), (1000, False)])
def test_no_tensor_has_all_tokens_and_the_vocabulary(problem_of, chunk, fits):
    problem = problem_of(LENGTHS)
    with Sizes() as sizes:
        chunked_loss(problem, chunk=chunk)
    assert (sizes.largest < 18 * 13) == fits


def test_no_argument_changes(problem_of):
    problem = problem_of(LENGTHS)
    arguments = [
        problem.hidden,
        problem.head,
        problem.teacher.hidden,
        problem.teacher.head,
        problem.reference.hidden,
        problem.reference.head,
        problem.token,
        problem.old_logprobs,
        problem.sampler_logprobs,
        problem.advantages,
    ]
    weights = torch.ones(18)
    tokens = Tokens(
        token=problem.token,
        row=problem.row,
        weights=dict.fromkeys(terms_of(Sum()), weights),
        sampler_logprobs=problem.sampler_logprobs,
        old_logprobs=problem.old_logprobs,
        advantages=problem.advantages,
    )
    losses = terms_of(Sum())
    tokens = with_sequence_statistics(losses, tokens, 8, hidden_and_head(problem), hidden_and_head(problem.teacher))
    arguments += [tokens.ratio, *tokens.sequence_means.values()]
    versions = [x._version for x in [*arguments, weights]]
    loss, _ = projected_loss(
        problem.hidden, problem.head, problem.teacher, tokens, Objective(losses, 1.0), 4, problem.reference
    )
    loss.backward()
    assert [x._version for x in [*arguments, weights]] == versions


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_token_logprobs_match_a_log_softmax(problem_of, chunk):
    problem = problem_of([3, 4])
    values = token_logprobs(problem.hidden, problem.head, problem.token, 0.7, chunk)
    full = (problem.hidden @ problem.head.T / 0.7).log_softmax(-1)
    expected = torch.stack([full[j, y] for j, y in enumerate(problem.token.tolist())])
    assert_close(values, expected.float())
    assert values.dtype == torch.float32
    assert not values.requires_grad


def test_token_logprobs_of_no_tokens(problem_of):
    problem = problem_of([2])
    empty = token_logprobs(problem.hidden[:0], problem.head, problem.token[:0], 1.0, 8)
    assert empty.shape == (0,)


TRANSFORMS = {"softcap": {"softcap": 2.0}, "scale": {"scale": 0.3}, "bias": {}, "all": {"scale": -1.7, "softcap": 3.0}}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("chunk", [2, 100])
def test_logit_transform_gradients_match_plain_autograd(problem_of, name, chunk):
    problem = problem_of([3, 4])
    draw = torch.Generator().manual_seed(5)
    with_bias = name in ("bias", "all")
    bias = torch.randn(13, generator=draw, dtype=torch.float64).requires_grad_()
    transform = LogitTransform(**TRANSFORMS[name], bias=bias if with_bias else None)
    tokens = Tokens(
        token=problem.token,
        row=problem.row,
        weights={"imitate": torch.linspace(0.2, 1, 7), "distil": torch.linspace(1, 0.1, 7)},
        sampler_logprobs=None,
        old_logprobs=None,
    )
    forward = Distillation(divergence=ForwardKl(), support=VocabularySupport())
    objective = Objective(Table({"imitate": CrossEntropy(), "distil": forward}), 1.0)
    inputs = [problem.hidden, problem.head, *([bias] if with_bias else [])]
    teacher = evolve(problem.teacher, transform=LogitTransform(softcap=1.5))
    loss, _ = projected_loss(problem.hidden, problem.head, teacher, tokens, objective, chunk, transform=transform)
    gradients = torch.autograd.grad(loss, inputs)

    z = problem.hidden @ problem.head.T + (bias if with_bias else 0)
    z = z * transform.scale
    cap = transform.softcap
    student_logprobs = (cap * torch.tanh(z / cap) if cap else z).log_softmax(-1)
    teacher_logprobs = (1.5 * torch.tanh(teacher.hidden @ teacher.head.T / 1.5)).log_softmax(-1)
    sampled_logprobs = student_logprobs.gather(-1, problem.token[:, None])[:, 0]
    divergences = (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)
    expected = (tokens.weights["distil"] * divergences - tokens.weights["imitate"] * sampled_logprobs).sum()
    assert_close(loss, expected, check_dtype=False)
    assert_close(gradients, torch.autograd.grad(expected, inputs), atol=1e-12, rtol=1e-9)
    values = token_logprobs(problem.hidden, problem.head, problem.token, 1.0, chunk, transform)
    assert_close(values, sampled_logprobs.float())
