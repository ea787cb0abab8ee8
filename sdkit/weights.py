"""One set of weights of a causal language model: switch it on, run it, stream it out.

The student and every local teacher are `Weights`.  With adapters several sets share one module and differ in which
adapter is on; nobody else toggles adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.batches import Sequences

STUDENT_ADAPTER = "default"
TEACHER_ADAPTER = "teacher"


class Weights:
    """A causal language model with one adapter on, none (`adapter=None`), or simply its own weights.

    `foreign` weights are those of another model than the student's: engines that hold the student cannot take them.
    """

    def __init__(
        self, model: nn.Module, adapter: str | None = STUDENT_ADAPTER, *, foreign: bool = False
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.foreign = foreign
        base: Any = model
        self.causal: Any = base.get_base_model() if hasattr(base, "peft_config") else base

    @property
    def head(self) -> Tensor:
        """The output projection, [V, H]."""
        return self.causal.get_output_embeddings().weight

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The causal language model, with these weights switched on inside the block."""
        layers = list(_adapter_layers(self.model))
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        for layer in layers:
            layer._disable_adapters = self.adapter is None
            if self.adapter is not None:
                layer._active_adapter = [self.adapter]
        try:
            yield self.causal
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states that predict the counted tokens.  -> [M, H] in the model's dtype."""
        with self.active() as causal:
            out = causal.base_model(
                input_ids=sequences.input_ids,
                attention_mask=sequences.attention_mask,
                position_ids=sequences.positions,
                use_cache=False,
            )
        return out.last_hidden_state.flatten(0, 1)[sequences.predicts]

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name; adapters are merged into copies, never into the model."""
        merged = {id(layer.get_base_layer().weight): layer for layer in _adapter_layers(self.model)}
        for name, parameter in self.causal.named_parameters():
            if ".lora_" in name:
                continue
            layer = merged.get(id(parameter))
            yield (
                name.replace(".base_layer.", "."),
                (parameter.detach() if layer is None else self._with_delta(layer, parameter)),
            )

    def _with_delta(self, layer: Any, parameter: Tensor) -> Tensor:
        if self.adapter is None:
            return parameter.detach()
        delta = layer.get_delta_weight(self.adapter).float()
        return (parameter.detach().float() + delta).to(parameter.dtype)


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    yield from (module for module in model.modules() if isinstance(module, LoraLayer))
