"""The self-test reports each fault of a divergence, and nothing else."""

import pytest
import torch

from sdkit.losses.divergence import Bounds, forward_kl, jsd, reverse_kl
from sdkit.losses.selftest import find_problems


def quadratic(student, teacher):
    return (student.exp() - teacher.exp()).square().sum(-1)


def in_place(student, teacher):
    value = quadratic(student, teacher)
    with torch.no_grad():
        teacher.add_(1)
    return value


def with_nan(student, teacher):
    return quadratic(student, teacher) + (student - student).sum(-1) / 0


def detached_half(student, teacher):
    s = student.exp()
    return (s.detach() * s).sum(-1) - 2 * (s * teacher.exp()).sum(-1)


def nan_gradient_at_absent_token(student, teacher):
    """The NaN of −inf − −inf shows in the gradient, not in the value."""
    entries = student.exp() * (student - teacher)
    return entries.where(student.isfinite(), 0.0).sum(-1)


FAULTS = {
    "returns float, not a tensor [5] of torch.float64": lambda s, t: 1.0,
    "returns a tensor [] of torch.float64": lambda s, t: quadratic(s, t).sum(),
    "returns a tensor [5] of torch.float64, not a tensor [5] of torch.float32": (
        lambda s, t: quadratic(s, t).double()
    ),
    "changes what it is given": in_place,
    "is not finite for finite inputs": with_nan,
    "something else when called again": lambda s, t: quadratic(s, t) * torch.rand(()),
    "mixes positions": lambda s, t: quadratic(s, t) - quadratic(s, t).mean(),
    "has no gradient": lambda s, t: quadratic(s.detach(), t),
    "has another gradient than its value": detached_half,
    "changes with a token that neither side has": lambda s, t: quadratic(s, t) * s.shape[-1],
    "not finite at a token that neither side has": nan_gradient_at_absent_token,
    "is not 0 where student and teacher agree": lambda s, t: quadratic(s, t) + 1,
    "pulls where student and teacher agree": lambda s, t: quadratic(s, t) + s[..., 0] - t[..., 0],
}


@pytest.mark.parametrize(("fault", "function"), FAULTS.items())
def test_each_fault_is_reported(fault, function):
    assert any(fault in problem for problem in find_problems(function))


def test_declared_properties_are_not_faults():
    assert list(find_problems(lambda s, t: quadratic(s, t) + 1, zero_when_equal=False)) == []
    problems = list(find_problems(detached_half, zero_when_equal=False, exact_gradient=False))
    assert problems == []


GOOD = {
    "quadratic": quadratic,
    "detached weights": lambda s, t: reverse_kl(s, t, detach_weights=True),
    "a bounded KL": lambda s, t: forward_kl(s, t, Bounds(low=-8.0, high=8.0)),
    "a narrow mixture": lambda s, t: jsd(s, t, 0.01),
}


@pytest.mark.parametrize("function", GOOD.values(), ids=GOOD)
def test_good_divergence_has_no_problem(function):
    assert list(find_problems(function)) == []
