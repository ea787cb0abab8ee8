import math

import pytest
import torch
from torch.testing import assert_close

from sdkit.losses.divergence import forward_kl, reverse_kl
from sdkit.losses.policy import (
    cap_binds,
    importance_ratio,
    k1,
    k2,
    k3,
    overlong_share,
    sampled_token_surrogate,
    sequence_mean,
)

OLD, NEW = torch.tensor([0.5, 0.4, 0.2]).log(), torch.tensor([0.55, 0.9, 0.7]).log()


def expected_gradient(estimate, pair):
    """Σ_y S_y ∇estimate(y): the expectation over the sampled token, with S_y constant."""
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    return torch.autograd.grad((s.exp().detach() * estimate(s, t)).sum(), pair.student)[0]


def exact_gradient(divergence, pair):
    value = divergence(pair.student.log_softmax(-1), pair.teacher.log_softmax(-1))
    return torch.autograd.grad(value, pair.student)[0]


def test_golden_ratios():
    ratio = importance_ratio(NEW, OLD, 2.0)
    assert_close(ratio, torch.tensor([1.1, 2.0, 2.0]), atol=1e-6, rtol=0)
    assert ratio.mean().item() == pytest.approx(1.7, abs=1e-6)
    assert cap_binds(NEW, OLD, 2.0).tolist() == [False, True, True]


def test_ratios_are_clamped_before_exp_and_have_no_gradient():
    now = torch.tensor([100.0, -100.0], requires_grad=True)
    ratio = importance_ratio(now, torch.zeros(2), 1e30)
    assert_close(ratio, torch.tensor([20.0, -20.0]).exp())
    assert not ratio.requires_grad


def test_sequence_mean_is_returned_for_every_token():
    values, row = torch.tensor([1.0, 3.0, 10.0, 5.0]), torch.tensor([0, 0, 2, 2])
    assert sequence_mean(values, row, 3).tolist() == [2.0, 2.0, 7.5, 7.5]
    assert sequence_mean(values[:0], row[:0], 0).shape == (0,)


def test_mean_over_the_counted_tokens_of_a_sequence():
    """What is not counted may be infinite; a sequence without counted tokens has the mean 0."""
    values = torch.tensor([1.0, torch.inf, 3.0, 5.0])
    row, counts = torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, True, False])
    assert sequence_mean(values, row, 2, counts).tolist() == [2.0, 2.0, 2.0, 0.0]


def test_golden_estimators(pair):
    s, t = pair.student.log_softmax(-1)[1], pair.teacher.log_softmax(-1)[1]
    for function, golden in [(k1, -0.9885193), (k2, 0.4885852), (k3, 0.6987332)]:
        assert function(s, t).item() == pytest.approx(golden, abs=1e-6)


def test_golden_surrogate(pair):
    s, t = pair.student.log_softmax(-1)[1], pair.teacher.log_softmax(-1)[1]
    value = sampled_token_surrogate(s, t)
    (grad,) = torch.autograd.grad(value, pair.student)
    golden = [0.550877, -0.785863, 0.122917, 0.074553, 0.027427, 0.010090]
    assert value.item() == pytest.approx(1.5665038, abs=1e-6)
    assert_close(grad, torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=0)


def test_bounded_surrogate_has_the_sign_and_gradient_of_its_token():
    student = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True)
    value = sampled_token_surrogate(student, torch.tensor([-8.0, -2.5, -1.0]), (-5.0, 4.0))
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert_close(grad, torch.tensor([4.0, 0.5, -5.0]))
    assert_close(value, torch.tensor([-4.0, -1.0, 45.0]))


def test_expected_k1_and_k3_are_the_reverse_kl(pair):
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    for function in (k1, k3):
        assert_close((s.exp() * function(s, t)).sum(), reverse_kl(s, t))


@pytest.mark.parametrize("function", [sampled_token_surrogate, k2])
def test_expected_gradient_is_that_of_the_reverse_kl(pair, function):
    assert_close(expected_gradient(function, pair), exact_gradient(reverse_kl, pair))


def test_k1_has_no_expected_gradient(pair):
    grad = expected_gradient(k1, pair)
    assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_expected_k3_gradient_is_that_of_the_forward_kl(pair):
    assert_close(expected_gradient(k3, pair), exact_gradient(forward_kl, pair))


def test_k3_is_exact_near_equality():
    s = torch.tensor(-1.0)
    assert k3(s, s + 1e-3).item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


@pytest.mark.parametrize("function", [sampled_token_surrogate, k1, k2, k3])
def test_teacher_gets_no_gradient_and_no_argument_changes(function):
    s, t = OLD.clone().requires_grad_(), NEW.clone().requires_grad_()
    function(s, t).sum().backward()
    assert t.grad is None
    assert s.grad is not None
    assert (s._version, t._version) == (0, 0)


def test_overlong_share_grows_over_the_stretch():
    """Limit 20, stretch 8: no penalty up to 12 tokens, then an eighth for each token."""
    lengths = torch.tensor([0, 12, 13, 16, 19, 20])
    assert overlong_share(lengths, 20, 8).tolist() == [0, 0, 0.125, 0.5, 0.875, 1]
