"""Activation checkpointing that leaves a model in eval mode: each block recomputes its activations in the backward pass.

transformers checkpoints in training mode alone, where dropout, router noise and dropped layers come alive too.  Here
the blocks' forward passes are wrapped instead, and a probe counts what was recomputed.
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
from sdkit.models.probes import ROUNDING, apart, probe
from sdkit.models.weights import Weights

KEY = ("model", "activation_checkpointing")


class RecomputedForward:
    """A block's forward pass; where gradients are recorded its activations are dropped and computed again."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.active = True
        self.runs = 0  # recomputations included

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return self._run(*args, **kwargs)
        # The model draws no random numbers (probes.py), so no generator's state is kept.
        return checkpoint(
            partial(self._run, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.forward(*args, **kwargs)


def enable(model: nn.Module) -> None:
    """Recompute the activations of every repeated block."""
    for block in list(_blocks(model)):
        block.forward = RecomputedForward(block.forward)


def check(weights: Weights, located: str, device: torch.device) -> None:
    """Raise BadData where checkpointing does not recompute every block that runs, or where it changes a number."""
    forwards = [
        block.forward
        for block in weights.causal.modules()
        if isinstance(block.forward, RecomputedForward)
    ]
    plain = _pass(weights, forwards, device, active=False)
    try:
        recomputed = _pass(weights, forwards, device, active=True)
    except RuntimeError as error:
        raise _refusal(located, f"recomputing fails ({first_line(error)})") from None
    if not recomputed.forward_runs or recomputed.backward_runs != recomputed.forward_runs:
        raise _refusal(
            located,
            f"{recomputed.backward_runs} of {recomputed.forward_runs} blocks are recomputed",
        )
    bound = ROUNDING[plain.hidden.dtype]
    for what, one, other in (
        ("hidden states", plain.hidden, recomputed.hidden),
        ("gradients", plain.gradient, recomputed.gradient),
    ):
        if not apart(one, other) < bound:
            raise _refusal(located, f"its {what} change")


@frozen(eq=False, kw_only=True)
class _Pass:
    hidden: Tensor  # [M, H]
    gradient: Tensor  # of the embedded tokens, [S, H]
    forward_runs: int  # of blocks, in the forward pass
    backward_runs: int


def _pass(
    weights: Weights, forwards: list[RecomputedForward], device: torch.device, *, active: bool
) -> _Pass:
    """Forward and backward through a short sequence, down to the embedded tokens: no parameter gets a gradient."""
    embedded: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tracked = output if output.requires_grad else output.detach().requires_grad_()
        embedded.append(tracked)
        return tracked

    handle = weights.causal.get_input_embeddings().register_forward_hook(record)
    before = [forward.runs for forward in forwards]
    for forward in forwards:
        forward.active = active
    try:
        with torch.enable_grad():
            hidden = weights.hidden(probe(weights, device))
        between = [forward.runs for forward in forwards]
        draw = torch.Generator().manual_seed(0)
        cotangent = torch.randn(hidden.shape, generator=draw).to(hidden)
        gradient = torch.autograd.grad(hidden, embedded[0], cotangent)[0]
    finally:
        handle.remove()
        for forward in forwards:
            forward.active = True
    return _Pass(
        hidden=hidden.detach(),
        gradient=gradient.flatten(0, -2),
        forward_runs=sum(between) - sum(before),
        backward_runs=sum(forward.runs for forward in forwards) - sum(between),
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules: decoder layers, but not the experts inside them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _refusal(located: str, reason: str) -> BadData:
    return BadData(
        f"{located} cannot checkpoint its activations: {reason}",
        hint="set model.activation_checkpointing: false and lower training.micro_batch_tokens",
        path=KEY,
    )
