"""Compares a step's gradient with the gradient of imitating its tokens, to tell a signal from rounding noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import MicroBatch
from sdkit.language.specs import CrossEntropy, LossSpec, Table
from sdkit.train.student import Student

NOISE_RATIO = 1e-5
"""A gradient whose norm is below this share of the imitation gradient's is rounding noise; float32 leaves about 1e-7."""


@frozen(kw_only=True)
class GradientNorms:
    """Squared norms of gradients with respect to the student's hidden states, in one training pass."""

    own: float  # of the objective
    imitation: float  # of cross-entropy on the same tokens, with the same weights and coefficients


def is_noise(passes: Sequence[GradientNorms]) -> bool:
    """Whether the first nonzero gradient is rounding noise.

    Later gradients do not count: the update that the first one caused may have produced them.
    """
    first = next((norms for norms in passes if norms.own > 0), None)
    return first is not None and first.own <= NOISE_RATIO**2 * first.imitation


def record_gradient_norms(student: Student) -> list[GradientNorms]:
    """Record the norms of every training pass from now on; returns the list that they are appended to."""
    passes: list[GradientNorms] = []
    original: Callable[..., Any] = student._projected_loss

    def recorded(hidden: Tensor, batch: MicroBatch, scores: Any, reference: Any, losses: Table[LossSpec]) -> Any:
        if torch.is_grad_enabled():
            imitation = Table({name: CrossEntropy(coefficient=loss.coefficient) for name, loss in losses.items()})
            passes.append(
                GradientNorms(
                    own=_squared_norm(original, hidden, batch, scores, reference, losses),
                    imitation=_squared_norm(original, hidden, batch, None, None, imitation),
                )
            )
        return original(hidden, batch, scores, reference, losses)

    student._projected_loss = recorded
    return passes


def _squared_norm(loss_function: Callable[..., Any], hidden: Tensor, *arguments: Any) -> float:
    """The squared norm of the loss's gradient with respect to `hidden`, without touching the training graph."""
    leaf = hidden.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_function(leaf, *arguments)[0], leaf)
    return gradient.float().square().sum().item()
