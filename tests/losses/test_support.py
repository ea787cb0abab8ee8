from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from sdkit.losses.divergence import forward_kl, jsd, reverse_kl
from sdkit.losses.support import (
    Remainder,
    mass,
    on_support,
    overlap,
    renormalize,
    sampled_token,
    tail_bucket,
    top_k_ids,
    union_ids,
)

NEVER = -torch.inf
REMAINDERS: tuple[Remainder, ...] = get_args(Remainder)


def half_jsd(s, t):
    return jsd(s, t, 0.5)


def none_of(ids):
    return torch.zeros_like(ids, dtype=torch.bool)


def over_top_k(pair, k, remainder, chooser="student"):
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    ids = top_k_ids(s if chooser == "student" else t, k)
    return on_support(s, t, ids, none_of(ids), remainder)


@pytest.mark.parametrize(
    ("k", "remainder", "function", "golden"),
    [
        (3, "tail_bucket", forward_kl, 0.3729522),
        (3, "tail_bucket", half_jsd, 0.0902667),
        (3, "tail_bucket", reverse_kl, 0.3774527),
        (3, "renormalize", forward_kl, 0.4322600),
        (3, "renormalize", half_jsd, 0.1012100),
        (3, "renormalize", reverse_kl, 0.4106672),
        (3, "drop", reverse_kl, 0.4246162),
        (3, "drop", forward_kl, 0.3014570),
        (2, "tail_bucket", forward_kl, 0.3484508),
        (2, "tail_bucket", reverse_kl, 0.3524702),
        (2, "tail_bucket", half_jsd, 0.0841372),
        (2, "renormalize", forward_kl, 0.4621172),
        (2, "renormalize", reverse_kl, 0.4621172),
    ],
)
def test_golden_values(pair, k, remainder, function, golden):
    value = function(*over_top_k(pair, k, remainder))
    assert value.item() == pytest.approx(golden, abs=1e-6)


def test_golden_renormalized_teacher(pair):
    value = forward_kl(*over_top_k(pair, 2, "renormalize_teacher", chooser="teacher"))
    assert value.item() == pytest.approx(0.7335527, abs=1e-6)


def test_golden_gradient_of_a_dropped_remainder(pair):
    (grad,) = torch.autograd.grad(reverse_kl(*over_top_k(pair, 3, "drop")), pair.student)
    golden = [0.390223, -0.266465, 0.024898, -0.098893, -0.036381, -0.013384]
    assert_close(grad, torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=0)


def test_tail_bucket_completes_the_distribution():
    top = torch.tensor([0.5, 0.3]).log()
    assert_close(tail_bucket(top).exp(), torch.tensor([0.5, 0.3, 0.2]))


def test_renormalize_rescales():
    top = torch.tensor([0.6, 0.2]).log()
    assert_close(renormalize(top).exp(), torch.tensor([0.75, 0.25]))


def test_tail_bucket_of_the_full_vocabulary_is_its_floor():
    full = torch.randn(100, 50).log_softmax(-1)  # rounding puts some sums above 1
    tail = tail_bucket(full)[:, -1]
    assert torch.isfinite(tail).all()
    assert (tail < -14).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [forward_kl, reverse_kl, half_jsd])
@pytest.mark.parametrize("remainder", ["tail_bucket", "renormalize", "drop"])
def test_support_of_the_full_vocabulary_gives_the_full_divergence(logits, dtype, function, remainder):
    student = logits.student.detach().to(dtype).requires_grad_()
    s, t = student.log_softmax(-1), logits.teacher.to(dtype).log_softmax(-1)
    ids = top_k_ids(s, 7)
    full, cut = function(s, t), function(*on_support(s, t, ids, none_of(ids), remainder))
    close = {"atol": 1e-12 if dtype == torch.float64 else 2e-6, "rtol": 0}
    assert_close(cut, full, **close)
    (grad,) = torch.autograd.grad(cut.sum(), student, retain_graph=True)
    assert_close(grad, *torch.autograd.grad(full.sum(), student), **close)


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, half_jsd])
def test_tail_bucket_is_a_lower_bound_that_grows_with_k(logits, function):
    s, t = logits.student.log_softmax(-1), logits.teacher.log_softmax(-1)
    bounds = []
    for k in range(1, 8):
        ids = top_k_ids(s, k)
        bounds.append(function(*on_support(s, t, ids, none_of(ids), "tail_bucket")))
    assert all((a <= b + 1e-12).all() for a, b in pairwise(bounds))
    assert (bounds[0] < bounds[-1]).all()


def test_tail_bucket_has_a_gradient(pair):
    (grad,) = torch.autograd.grad(forward_kl(*over_top_k(pair, 2, "tail_bucket")), pair.student)
    s, t = pair.student.softmax(-1), pair.teacher.softmax(-1)
    outside = s[2:] * (1 - t[2:].sum() / s[2:].sum())  # ∂/∂z_v = S_v − T_tail S_v / S_tail
    assert_close(grad, torch.cat([(s - t)[:2], outside]))


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, half_jsd])
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_equal_distributions_have_no_divergence_and_no_gradient(logits, function, remainder):
    s = logits.student.log_softmax(-1)
    ids = top_k_ids(s, 3)
    value = function(*on_support(s, s.detach(), ids, none_of(ids), remainder))
    (grad,) = torch.autograd.grad(value.sum(), logits.student)
    if remainder == "renormalize_teacher" and function is forward_kl:
        assert_close(value, -mass(s, ids, none_of(ids)).log())  # its minimum, by design above 0
    if remainder != "renormalize_teacher":
        assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    if remainder in ("tail_bucket", "renormalize") or (remainder, function) == ("drop", half_jsd):
        assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_top_k_ids():
    assert top_k_ids(torch.tensor([[0.1, 0.5, 0.4], [3.0, 1.0, 2.0]]), 2).tolist() == [[1, 2], [0, 2]]
    with pytest.raises(ValueError, match="top 4 of a vocabulary of 3 tokens"):
        top_k_ids(torch.zeros(1, 3), 4)


def test_union_ids_mark_the_second_of_a_pair():
    ids, duplicate = union_ids(torch.tensor([[4, 1], [0, 2]]), torch.tensor([[1, 3], [2, 0]]))
    assert ids.tolist() == [[1, 1, 3, 4], [0, 0, 2, 2]]
    assert duplicate.tolist() == [[False, True, False, False], [False, True, False, True]]


def test_overlap_and_mass():
    assert overlap(torch.tensor([[4, 1], [0, 2]]), torch.tensor([[1, 3], [2, 0]])).tolist() == [0.5, 1.0]
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ids, duplicate = torch.tensor([[0, 0, 1]]), torch.tensor([[False, True, False]])
    assert_close(mass(p, ids, duplicate), torch.tensor([0.8]))


def test_sampled_token():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert_close(sampled_token(p, torch.tensor([0, 1])).exp(), torch.tensor([0.5, 0.1]))


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, half_jsd])
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_duplicates_count_once_in_value_and_gradient(logits, function, remainder):
    s, t = logits.student.log_softmax(-1), logits.teacher.log_softmax(-1)
    once = top_k_ids(s, 3)
    twice, duplicate = union_ids(once, once)
    plain = function(*on_support(s, t, once, none_of(once), remainder))
    value = function(*on_support(s, t, twice, duplicate, remainder))
    assert_close(value, plain)
    (grad,) = torch.autograd.grad(value.sum(), logits.student, retain_graph=True)
    assert_close(grad, *torch.autograd.grad(plain.sum(), logits.student))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("rule", [tail_bucket, renormalize])
def test_rows_without_entries_have_finite_gradients(rule):
    logprobs = torch.full((2, 3), NEVER, requires_grad=True)
    p = rule(logprobs).exp()
    p.sum().backward()
    assert_close(p[:, :3], torch.zeros(2, 3))
    assert_close(logprobs.grad, torch.zeros(2, 3))


def test_support_changes_no_argument_and_its_ids_have_no_gradient(pair):
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    ids, duplicate = union_ids(top_k_ids(s, 2), top_k_ids(t, 2))
    arguments = (s, t, ids, duplicate)
    versions = [x._version for x in arguments]
    for remainder in REMAINDERS:
        on_support(*arguments, remainder)
    assert [x._version for x in arguments] == versions
    assert not ids.requires_grad
