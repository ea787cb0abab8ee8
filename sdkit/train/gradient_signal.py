"""How large a step's gradient is beside what imitating its tokens would give: a signal, or rounding noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import MicroBatch
from sdkit.language.specs import CrossEntropy, LossSpec, Table
from sdkit.train.step import Student

NOISE = 1e-5
"""Share of the gradient of imitation below which a gradient is rounding noise: float32 makes some 1e-7 of it."""


@frozen(kw_only=True)
class Pass:
    """Squared norms of gradients with respect to the student's hidden states, in one training pass."""

    own: float  # of the objective
    imitation: (
        float  # of the cross-entropy on the same tokens, with the same weights and coefficients
    )


def is_noise(passes: Sequence[Pass]) -> bool:
    """Whether the first gradient that is not 0 is rounding noise; later ones may come of the step that it led to."""
    first = next((each for each in passes if each.own > 0), None)
    return first is not None and first.own <= NOISE**2 * first.imitation


def watch(student: Student) -> list[Pass]:
    """Measure every training pass from now on; returns the list that is then filled."""
    passes: list[Pass] = []
    inner: Callable[..., Any] = student._projected_loss

    def projected(hidden: Tensor, batch: MicroBatch, *given: Any) -> Any:
        if torch.is_grad_enabled():
            losses: Table[LossSpec] = given[-1]
            imitated = Table(
                {n: CrossEntropy(coefficient=t.coefficient) for n, t in losses.items()}
            )
            own = _square(inner, hidden, batch, *given)
            passes.append(
                Pass(own=own, imitation=_square(inner, hidden, batch, None, None, imitated))
            )
        return inner(hidden, batch, *given)

    vars(student)["_projected"] = projected
    return passes


def _square(inner: Callable[..., Any], hidden: Tensor, *given: Any) -> float:
    alone = hidden.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(alone, *given)[0], alone)
    return gradient.float().square().sum().item()
