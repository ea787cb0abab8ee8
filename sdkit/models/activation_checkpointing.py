"""Activation checkpointing for a model in eval mode: each block recomputes its activations in the backward pass.

transformers supports checkpointing only in training mode, which also enables dropout, router noise and layer dropping.
This module wraps the forward pass of each block instead, and a probe counts the recomputed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdkit.language.errors import BadData, first_line
from sdkit.models.probes import ROUNDING, probe_sequence, relative_difference
from sdkit.models.weights import Weights

KEY = ("model", "activation_checkpointing")


class RecomputedForward:
    """A block's forward pass; with gradients enabled, it discards its activations and recomputes them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.active = True
        self.runs = 0  # recomputations included

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return self._run(*args, **kwargs)
        # The model draws no random numbers (probes.py), so no generator state needs saving.
        return checkpoint(partial(self._run, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.forward(*args, **kwargs)


def enable(model: nn.Module) -> None:
    """Wrap every repeated block so that it recomputes its activations."""
    for block in list(_blocks(model)):
        block.forward = RecomputedForward(block.forward)


def check(weights: Weights, located: str, device: torch.device) -> None:
    """Raise BadData unless checkpointing recomputes every block that runs and leaves states and gradients unchanged."""
    forwards = [block.forward for block in weights.causal.modules() if isinstance(block.forward, RecomputedForward)]
    plain = _run_pass(weights, forwards, device, active=False)
    try:
        recomputed = _run_pass(weights, forwards, device, active=True)
    except RuntimeError as error:
        raise _bad_data(located, f"recomputing fails ({first_line(error)})") from None
    if not recomputed.forward_runs or recomputed.backward_runs != recomputed.forward_runs:
        raise _bad_data(located, f"{recomputed.backward_runs} of {recomputed.forward_runs} blocks are recomputed")
    bound = ROUNDING[plain.hidden.dtype]
    for name, expected, actual in (
        ("hidden states", plain.hidden, recomputed.hidden),
        ("gradients", plain.gradient, recomputed.gradient),
    ):
        if not relative_difference(expected, actual) < bound:
            raise _bad_data(located, f"its {name} change")


@frozen(eq=False, kw_only=True)
class _Pass:
    hidden: Tensor  # [M, H]
    gradient: Tensor  # with respect to the token embeddings, [S, H]
    forward_runs: int  # block calls in the forward pass
    backward_runs: int  # block calls in the backward pass: recomputations


def _run_pass(weights: Weights, forwards: list[RecomputedForward], device: torch.device, *, active: bool) -> _Pass:
    """Run a short sequence forward, and backward to the token embeddings; no parameter gets a gradient."""
    embedded: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tracked = output if output.requires_grad else output.detach().requires_grad_()
        embedded.append(tracked)
        return tracked

    start = [forward.runs for forward in forwards]
    for forward in forwards:
        forward.active = active
    try:
        with weights.causal.get_input_embeddings().register_forward_hook(record), torch.enable_grad():
            hidden = weights.hidden(probe_sequence(weights, device))
        middle = [forward.runs for forward in forwards]
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(hidden.shape, generator=generator).to(hidden)
        gradient = torch.autograd.grad(hidden, embedded[0], cotangent)[0]
        weights.sharding.release()
    finally:
        for forward in forwards:
            forward.active = True
    return _Pass(
        hidden=hidden.detach(),
        gradient=gradient.flatten(0, -2),
        forward_runs=sum(middle) - sum(start),
        backward_runs=sum(forward.runs for forward in forwards) - sum(middle),
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the elements of the outermost module lists: decoder layers, but not the experts inside them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _bad_data(located: str, reason: str) -> BadData:
    return BadData(
        f"{located} cannot checkpoint its activations: {reason}",
        hint="set model.activation_checkpointing: false and lower training.micro_batch_tokens",
        path=KEY,
    )
