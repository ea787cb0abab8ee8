"""Checks that every divergence must pass, built-in or user-defined: small inputs, a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Takes log-probabilities of student and teacher, [..., K], [..., K] -> [...]."""

STEP = 1e-5
"""Step of the central differences; their error is of order STEP²."""


def find_problems(function: Divergence, *, zero_when_equal: bool = True, exact_gradient: bool = True) -> Iterator[str]:
    """Yields what is wrong with a divergence, as phrases that follow its name.

    Exceptions of `function` propagate.  A wrong shape ends the checks.
    """
    student, teacher = _logits(0).log_softmax(-1), _logits(1).log_softmax(-1)
    wrong_shape = next(_shape_problems(function, student, teacher), None)
    if wrong_shape:
        yield wrong_shape
        return
    values = function(student, teacher)
    if not values.isfinite().all():
        yield "is not finite for finite inputs"
        return
    if not _same(values, function(student, teacher)):
        yield "returns something else when called again"
    one_by_one = [function(s, t) for s, t in zip(student.split(1), teacher.split(1), strict=True)]
    if not _same(values, torch.cat(one_by_one)):
        yield "mixes positions: one alone has another value than beside others"
    yield from _gradient_problems(function, teacher, exact_gradient)
    yield from _impossible_token_problems(function, student, teacher)
    if zero_when_equal:
        yield from _zero_problems(function)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def _logits(seed: int) -> Tensor:
    """[5, 7] float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(5, 7, generator=draw, dtype=torch.float64)


def _shape_problems(function: Divergence, student: Tensor, teacher: Tensor) -> Iterator[str]:
    for rows in (5, 0):
        for dtype in (torch.float64, torch.float32):
            inputs = student[:rows].to(dtype), teacher[:rows].to(dtype)
            copies = [x.clone() for x in inputs]
            result = function(*inputs)
            expected = f"a tensor [{rows}] of {dtype}"
            if not isinstance(result, Tensor):
                yield f"returns {type(result).__name__}, not {expected}"
            elif result.shape != (rows,) or result.dtype != dtype:
                yield f"returns a tensor {list(result.shape)} of {result.dtype}, not {expected}"
            if not all(map(torch.equal, inputs, copies)):
                yield "changes what it is given"


def _gradient(function: Divergence, logits: Tensor, teacher: Tensor) -> Tensor | None:
    """Gradient of the sum over positions in the student's logits; None if the sum does not depend on them."""
    logits = logits.clone().requires_grad_()
    with torch.enable_grad():
        value = function(logits.log_softmax(-1), teacher).sum()
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, logits, allow_unused=True)[0]


def _gradient_problems(function: Divergence, teacher: Tensor, exact: bool) -> Iterator[str]:
    logits = _logits(0)
    grad = _gradient(function, logits, teacher)
    if grad is None:
        yield "has no gradient in the student's log-probabilities"
        return
    if not grad.isfinite().all():
        yield "has a gradient that is not finite for finite inputs"
        return
    if exact and not torch.allclose(grad, _differences(function, logits, teacher), rtol=1e-5, atol=1e-6):
        yield "has another gradient than its value: set exact_gradient to false where that is meant"


@torch.no_grad()
def _differences(function: Divergence, logits: Tensor, teacher: Tensor) -> Tensor:
    """The gradient by central differences; positions do not mix, so one entry of all of them is moved at a time."""
    columns: list[Tensor] = []
    for entry in range(logits.shape[-1]):
        ends: list[Tensor] = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[:, entry] += sign * STEP
            ends.append(function(moved.log_softmax(-1), teacher))
        columns.append((ends[0] - ends[1]) / (2 * STEP))
    return torch.stack(columns, -1)


def _impossible_token_problems(function: Divergence, student: Tensor, teacher: Tensor) -> Iterator[str]:
    """Appends a token that is impossible on both sides (log-probability −inf) to every position."""
    impossible = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    wide = torch.cat([student, impossible], -1).requires_grad_()
    with torch.enable_grad():
        value = function(wide, torch.cat([teacher, impossible], -1))
    hint = "mask such entries before the arithmetic"
    if not _same(value, function(student, teacher)):
        yield f"changes with a token that neither side has (both log-probabilities −inf): {hint}"
    elif value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), wide)
        if not grad.isfinite().all():
            yield f"has a gradient that is not finite at a token that neither side has: {hint}"


def _zero_problems(function: Divergence) -> Iterator[str]:
    logits = _logits(0)
    same = logits.log_softmax(-1)
    value, grad = function(same, same), _gradient(function, logits, same)
    if not torch.allclose(value, torch.zeros_like(value), atol=1e-8):
        yield "is not 0 where student and teacher agree: set zero_when_equal to false where that is meant"
    elif grad is not None and not torch.allclose(grad, torch.zeros_like(grad), atol=1e-8):
        yield "pulls where student and teacher agree: set zero_when_equal to false where that is meant"
