"""Measures how a model turns head × hidden into logits: configurations express it in many ways, or not at all."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn import functional

from sdkit.batches import LogitTransform
from sdkit.language.errors import BadData, first_line

PROBE_TOKENS = 8
TINY, HUGE = 1e-5, 1e30
"""Head outputs that reveal the slope at zero, and the softcap if there is one."""


def decoder(causal: Any) -> Any:
    """What computes the hidden states of a causal language model; the model itself where it has no such part."""
    # Some classes name their base model by a wrong attribute, and transformers then returns the class itself.
    base = causal.base_model
    return getattr(causal, "model", causal) if base is causal else base


def check_parts(causal: Any) -> None:
    """Raise BadData if a causal language model has no output projection or no base model."""
    head = causal.get_output_embeddings()
    if head is None or decoder(causal) is causal:
        missing = "output projection" if head is None else "base model that returns hidden states"
        raise BadData(f"the model has no {missing}, which the losses need")


@torch.no_grad()
def measure_transform(causal: Any, head_shape: torch.Size | None = None) -> LogitTransform:
    """Returns the transform of a causal language model, without its bias.

    One forward pass with known values in place of the last hidden state and of the head's output shows what the model
    computes before and after its head.  `head_shape`: (V, H), needed if the parameters are sharded; then call this
    inside `Sharding.run_forward`.  Raises BadData if `LogitTransform` cannot express it.
    """
    check_parts(causal)
    head, base = causal.get_output_embeddings(), decoder(causal)
    probe = _Probe(head, head_shape or head.weight.shape)
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % probe.known_outputs.shape[-1]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(base.register_forward_hook(probe.replace_hidden))
            stack.enter_context(head.register_forward_pre_hook(probe.replace_head_input))
            stack.enter_context(head.register_forward_hook(probe.replace_head_output))
            logits = causal(input_ids=ids, use_cache=False).logits
        direct = base(input_ids=ids, use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadData(f"the model's logits cannot be measured: {first_line(error)}") from None
    before = probe.scale_before(direct)
    if before != 1 and getattr(head, "bias", None) is not None:
        raise BadData("the model scales its hidden states before an output projection with a bias")
    after = _fit_transform(probe.known_outputs, logits)
    return evolve(after, scale=before * after.scale)


class _Probe:
    """Replaces a model's last hidden state and its head's output by known values, and records the head's inputs."""

    def __init__(self, head: Any, head_shape: torch.Size) -> None:
        rows, width = head_shape
        kind: Any = {"dtype": torch.float64, "device": head.weight.device}
        self.head = head
        self.known_states = torch.linspace(-2, 2, PROBE_TOKENS * width, **kind).view(1, -1, width)
        index = torch.arange(PROBE_TOKENS * rows, **kind).view(1, -1, rows)
        # Many small values among large ones.
        self.known_outputs = 200 * (0.7 * index + 0.3).sin() ** 3
        self.known_outputs[:, 0] = TINY * self.known_outputs[:, 0].sign()
        self.known_outputs[:, 1] = HUGE * self.known_outputs[:, 1].sign()
        self.last_hidden: Tensor | None = None  # the model's own last hidden state
        self.head_inputs: list[Tensor] = []  # one per call of the head
        self.weight: Tensor | None = None  # the head's
        self.bias: Tensor | None = None
        self.head_is_linear = True  # whether the head is weight × input + bias

    def replace_hidden(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self.last_hidden = output.last_hidden_state
        output.last_hidden_state = self.known_states
        return output

    def replace_head_input(self, _module: nn.Module, args: Any) -> Any:
        self.head_inputs.append(args[0])
        # Sharded parameters are complete here, and released when `replace_head_output` is called.
        bias = getattr(self.head, "bias", None)
        self.weight, self.bias = self.head.weight.detach(), None if bias is None else bias.detach()
        return (self.known_states.to(self.head.weight.dtype), *args[1:])

    def replace_head_output(self, _module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.weight is not None
        expected = functional.linear(args[0], self.weight, self.bias)
        self.head_is_linear &= expected.shape == output.shape and _is_close(output, expected)
        return self.known_outputs

    def scale_before(self, direct: Tensor) -> float:
        """Returns the factor between the last hidden state and the head's input.

        `direct` is the last hidden state of the base model alone.  Raises BadData if there is no such factor.
        """
        if len(self.head_inputs) != 1:
            raise BadData("the model does not compute its logits by one call of its output projection")
        (head_input,) = self.head_inputs
        if not self.head_is_linear:
            raise BadData("the model's output projection is not linear")
        other = "the model's logits come from other hidden states than its base model's last"
        if self.last_hidden is None:  # it calls only part of its base model: nothing was replaced
            if head_input.shape != direct.shape or not _is_close(head_input, direct, loose=True):
                raise BadData(other)
            return 1.0
        if not _is_close(self.last_hidden, direct, loose=True):
            raise BadData(other)
        layers = "the model has further layers between its last hidden state and its output projection"
        if head_input.shape != self.known_states.shape:
            raise BadData(layers)
        scale = float((head_input.double() * self.known_states).sum() / self.known_states.square().sum())
        if not _is_close(head_input, scale * self.known_states):
            raise BadData(layers)
        return _snap_to_one(scale)


def _fit_transform(outputs: Tensor, logits: Tensor) -> LogitTransform:
    """Returns the scale and softcap that turn head outputs [1, T, V] into logits.  Raises BadData if there are none."""
    if logits.shape != outputs.shape:
        raise BadData(
            f"the model's logits have the shape {tuple(logits.shape)}, its output projection {tuple(outputs.shape)}"
        )
    slope = float((logits[0, 0].double() / outputs[0, 0]).median())
    limit = float(logits[0, 1].double().abs().median())
    transform = LogitTransform(scale=_snap_to_one(slope), softcap=limit if limit < HUGE / 1e10 else None)
    expected = transform(outputs)
    difference = (logits.double() - expected).abs()
    tolerance = _tolerance(logits.dtype)
    wrong = ~(difference <= tolerance * (expected.abs() + TINY))[0].all(0)
    if not wrong.any():
        return transform
    example = int(wrong.nonzero()[0])
    raise BadData(
        f"the model changes {int(wrong.sum())} of {len(wrong)} logits (such as that of token id {example}) by more "
        "than a bias, a scale and a softcap, which are all that the losses apply"
    )


def _is_close(actual: Tensor, expected: Tensor, *, loose: bool = False) -> bool:
    """Whether all values agree, relative to the largest.  `loose`: for two forward passes, with more rounding."""
    low = torch.finfo(actual.dtype).bits < 32
    tolerance = (0.1 if low else 1e-3) if loose else _tolerance(actual.dtype)
    difference = (actual.double() - expected.double()).abs().max()
    return bool(difference <= tolerance * expected.double().abs().max())


def _tolerance(dtype: torch.dtype) -> float:
    return 2**-7 if torch.finfo(dtype).bits < 32 else 1e-5


def _snap_to_one(scale: float) -> float:
    """Returns 1 if the scale differs from 1 only by rounding; otherwise the scale."""
    return 1.0 if abs(scale - 1) < 1e-6 else scale
