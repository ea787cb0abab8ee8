import math

import pytest
import torch
from torch.testing import assert_close

from sdkit.losses.divergence import (
    Bounds,
    entropy,
    forward_kl,
    jsd,
    linear_mix,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from sdkit.losses.selftest import find_problems

NEVER = -torch.inf

FORMS = {
    "forward_kl": (0.0, forward_kl),
    "reverse_kl": (0.0, reverse_kl),
    "jsd": (0.3, lambda s, t: jsd(s, t, 0.3)),
    "linear_mix": (0.2, lambda s, t: linear_mix(s, t, 0.2)),
    "skewed_forward_kl": (0.1, lambda s, t: skewed_forward_kl(s, t, 0.1)),
    "skewed_reverse_kl": (0.1, lambda s, t: skewed_reverse_kl(s, t, 0.1)),
}


@pytest.fixture(params=FORMS)
def divergence(request):
    return request.param, *FORMS[request.param]


@pytest.mark.parametrize(
    ("function", "golden"),
    [
        (forward_kl, 0.3798454),
        (reverse_kl, 0.3845426),
        (lambda s, t: jsd(s, t, 0.3), 0.0775161),
        (lambda s, t: jsd(s, t, 0.5), 0.0919640),
        (lambda s, t: jsd(s, t, 0.7), 0.0778729),
    ],
)
def test_divergence_golden_values(pair, function, golden):
    value = function(pair.student.log_softmax(-1), pair.teacher.log_softmax(-1))
    assert value.item() == pytest.approx(golden, abs=1e-6)


def test_divergence_golden_gradients(pair):
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    (grad,) = torch.autograd.grad(forward_kl(s, t), pair.student, retain_graph=True)
    assert_close(grad, s.exp() - t.exp())
    (grad,) = torch.autograd.grad(reverse_kl(s, t), pair.student)
    golden = [0.349377, -0.281491, 0.015784, -0.065845, -0.024223, 0.006399]
    assert_close(grad, torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=0)


def test_value_and_gradient_match_loops(logits, naive, divergence):
    name, share, function = divergence
    values = function(logits.student.log_softmax(-1), logits.teacher.log_softmax(-1))
    (grads,) = torch.autograd.grad(values.sum(), logits.student)
    for value, grad, z, q in zip(values, grads, logits.student.tolist(), logits.teacher.tolist(), strict=True):

        def loss(z, q=q):
            return naive.diverge(name, share, naive.softmax(z), naive.softmax(q))

        assert value.item() == pytest.approx(loss(z), abs=1e-12)
        assert grad.tolist() == pytest.approx(naive.slope(loss, z), abs=1e-8)


def test_gradcheck_on_unnormalized_entries(logits, divergence):
    teacher = logits.teacher - 4
    assert torch.autograd.gradcheck(lambda s: divergence[2](s - 3, teacher), logits.student)


def test_equal_distributions_give_zero_value_and_gradient(logits, divergence):
    value = divergence[2](logits.student.log_softmax(-1), logits.student.log_softmax(-1))
    (grad,) = torch.autograd.grad(value.sum(), logits.student)
    assert_close(value, torch.zeros_like(value), atol=1e-14, rtol=0)
    assert_close(grad, torch.zeros_like(grad), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("share", "scale", "golden"), [(0.001, 0.001, 0.37941), (0.999, 0.001, 0.38409)])
def test_jsd_divided_by_a_small_share_approaches_the_kls(pair, share, scale, golden):
    value = jsd(pair.student.log_softmax(-1), pair.teacher.log_softmax(-1), share)
    assert value.item() / scale == pytest.approx(golden, abs=1e-5)


def test_jsd_of_disjoint_distributions_is_log_2():
    s, t = torch.tensor([0.0, NEVER]), torch.tensor([NEVER, 0.0])
    assert jsd(s, t, 0.5).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_jsd_rejects_shares_of_0_and_1(pair, share):
    with pytest.raises(ValueError, match=r"math domain|expected a positive"):
        jsd(pair.student, pair.teacher, share)


def test_linear_mix_at_its_ends_is_one_kl_even_if_the_other_is_infinite():
    half, all_first = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, NEVER])
    assert linear_mix(half, all_first, 1.0).item() == pytest.approx(math.log(2))
    assert linear_mix(all_first, half, 0.0).item() == pytest.approx(math.log(2))
    assert linear_mix(half, all_first, 0.0).item() == math.inf


def test_entry_absent_on_both_sides_changes_nothing(logits, divergence):
    never = torch.full((5, 1), NEVER, dtype=torch.float64)
    s, t = logits.student.log_softmax(-1), logits.teacher.log_softmax(-1)
    plain = divergence[2](s, t)
    value = divergence[2](torch.cat([s, never], -1), torch.cat([t, never], -1))
    assert_close(value, plain)
    (grad,) = torch.autograd.grad(value.sum(), logits.student, retain_graph=True)
    assert_close(grad, *torch.autograd.grad(plain.sum(), logits.student))


def test_entry_absent_on_the_weighting_side_counts_zero():
    complete = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    incomplete = torch.tensor([0.6, 0.4, 0.0]).log()
    by_hand = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.3)

    value = forward_kl(complete, incomplete)
    value.backward()
    assert value.item() == pytest.approx(by_hand, abs=1e-6)
    assert_close(complete.grad, torch.tensor([-0.6, -0.4, 0.0]))

    student = incomplete.clone().requires_grad_()
    value = reverse_kl(student, complete)
    value.backward()
    assert value.item() == pytest.approx(by_hand, abs=1e-6)
    assert student.grad is not None
    assert_close(student.grad[:2], student.exp()[:2] * (student - complete + 1)[:2])
    assert student.grad[2] == 0


def test_jsd_is_finite_if_one_side_lacks_an_entry():
    for s, t in [([0.6, 0.4, 0.0], [0.5, 0.3, 0.2]), ([0.5, 0.3, 0.2], [0.6, 0.4, 0.0])]:
        student = torch.tensor(s).log().requires_grad_()
        value = jsd(student, torch.tensor(t).log(), 0.5)
        value.backward()
        by_hand = sum(
            0.5 * p * math.log(p / ((a + b) / 2)) for a, b in zip(s, t, strict=True) for p in (a, b) if p > 0
        )
        assert value.item() == pytest.approx(by_hand, abs=1e-6)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()


def test_position_without_entries_counts_zero(divergence):
    student = torch.full((2, 4), NEVER, requires_grad=True)
    value = divergence[2](student, torch.full((2, 4), NEVER))
    value.sum().backward()
    assert_close(value, torch.zeros(2))
    assert_close(student.grad, torch.zeros(2, 4))


def test_probabilities_below_float32_count_zero(divergence):
    s = torch.tensor([0.0, -200.0, NEVER, -300.0], requires_grad=True)
    value = divergence[2](s, torch.tensor([0.0, NEVER, -200.0, -400.0]))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=6e-8)  # jsd: half an ulp of the mixture's log
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_teacher_gets_no_gradient_and_no_argument_changes(logits, divergence):
    s, t = logits.student.log_softmax(-1), logits.teacher.requires_grad_().log_softmax(-1)
    versions = s._version, t._version
    divergence[2](s, t).sum().backward()
    assert logits.teacher.grad is None
    assert (s._version, t._version) == versions


def test_dtype_and_leading_shape_are_kept(divergence):
    s = torch.randn(2, 3, 4).log_softmax(-1)
    value = divergence[2](s, s.flip(-1))
    assert value.shape == (2, 3)
    assert value.dtype == torch.float32


def test_entropy_by_hand():
    assert entropy(torch.tensor([0.5, 0.5, 0.0]).log()).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([0.0, NEVER])).item() == 0


def test_every_built_in_divergence_passes_the_self_test(divergence):
    assert list(find_problems(divergence[2])) == []


@pytest.mark.parametrize("function", [skewed_forward_kl, skewed_reverse_kl])
def test_skewed_kl_is_finite_where_the_kl_is_infinite(function):
    """KL(T‖s T + (1 − s) S) is at most −log s, and the other way round."""
    one, other = torch.tensor([0.0, NEVER]), torch.tensor([NEVER, 0.0])
    assert function(one, other, 0.1).item() == pytest.approx(-math.log(0.1))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"math domain|expected a positive"):
            function(one, other, share)


def test_skewed_kls_approach_the_kls(pair):
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    assert skewed_forward_kl(s, t, 1e-9).item() == pytest.approx(forward_kl(s, t).item(), abs=1e-7)
    assert skewed_reverse_kl(s, t, 1e-9).item() == pytest.approx(reverse_kl(s, t).item(), abs=1e-7)


def test_golden_entry_bound(pair):
    """OPSD's clip (arXiv 2601.18734) at 0.05."""
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    value = forward_kl(s, t, Bounds(entry=0.05))
    assert value.item() == pytest.approx(-0.1247944, abs=1e-7)


BOUNDS = [
    Bounds(entry=0.05),
    Bounds(low=-0.5, high=0.4),
    Bounds(low=-0.5, high=0.4, entry=0.02),
    Bounds(low=-1.0),
    Bounds(high=0.1),
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("function", [forward_kl, reverse_kl])
def test_bounds_match_loops(logits, naive, function, bounds):
    """log S − log T is bounded for both, whichever way the KL goes; then each entry."""

    def loss(z, q):
        s, t = naive.softmax(z), naive.softmax(q)
        total = 0.0
        for a, b in zip(s, t, strict=True):
            ratio = min(max(math.log(a) - math.log(b), bounds.low), bounds.high)
            entry = -b * ratio if function is forward_kl else a * ratio
            total += min(entry, bounds.entry)
        return total

    values = function(logits.student.log_softmax(-1), logits.teacher.log_softmax(-1), bounds)
    (grads,) = torch.autograd.grad(values.sum(), logits.student)
    free = function(logits.student.log_softmax(-1), logits.teacher.log_softmax(-1))
    assert not torch.allclose(values, free)
    for value, grad, z, q in zip(values, grads, logits.student.tolist(), logits.teacher.tolist(), strict=True):
        assert value.item() == pytest.approx(loss(z, q), abs=1e-12)
        assert grad.tolist() == pytest.approx(naive.slope(lambda z, q=q: loss(z, q), z), abs=1e-7)


def test_bounded_entry_has_no_gradient_of_its_own():
    student = torch.tensor([0.2, 0.8], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    forward_kl(student, teacher, Bounds(entry=0.05)).backward()
    assert student.grad is not None
    assert_close(student.grad, torch.tensor([0.0, -0.1], dtype=torch.float64))


def test_golden_gradients_on_part_of_the_vocabulary(pair):
    """Autograd has an extra + 1, detached weights do not."""
    s, t = pair.student.log_softmax(-1)[:3], pair.teacher.log_softmax(-1)[:3]
    golden = {
        False: [0.390223, -0.266465, 0.024898, -0.098893, -0.036381, -0.013384],
        True: [0.327045, -0.289707, 0.010801, -0.032024, -0.011781, -0.004334],
    }
    for detach, expected in golden.items():
        value = reverse_kl(s, t, detach_weights=detach)
        assert value.item() == pytest.approx(0.4246162, abs=1e-7)
        (grad,) = torch.autograd.grad(value, pair.student, retain_graph=True)
        assert_close(grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_detached_weights_change_nothing_on_the_full_vocabulary(logits):
    s, t = logits.student.log_softmax(-1), logits.teacher.log_softmax(-1)
    values = [reverse_kl(s, t, detach_weights=detach) for detach in (False, True)]
    grads = [torch.autograd.grad(v.sum(), logits.student, retain_graph=True)[0] for v in values]
    assert_close(*values)
    assert_close(*grads)


def test_detached_weights_are_bounded_and_skip_absent_entries():
    student = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()
    bounds = Bounds(high=0.5)
    value = reverse_kl(student, teacher, bounds, detach_weights=True)
    value.backward()
    by_hand = [0.6 * 0.5, 0.4 * math.log(0.4 / 0.5), 0.0]
    assert value.item() == pytest.approx(sum(by_hand))
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx(by_hand)
