"""One set of weights of a causal language model: switch it on, run it, stream it out.

The student and every local teacher are `Weights`.  With adapters several sets share one module and differ in which
adapter is on; nobody else toggles adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from attrs import evolve
from torch import Tensor, nn

from sdkit.batches import HiddenStateScores, LogitTransform, PaddedSequences
from sdkit.models.logit_transform import decoder, measure_transform

Result = TypeVar("Result")

STUDENT_ADAPTER = "default"
TEACHER_ADAPTER = "teacher"


class Sharding(Protocol):
    """How a model's parameters lie on the ranks, and what it takes to read and to write them.  All ranks call, in step."""

    def run_forward(self, function: Callable[..., Result], *given: Any) -> Result:
        """The function of these arguments, within a forward pass of the model."""
        ...

    def run_with_head(self, function: Callable[..., Result], hidden: Tensor, *given: Any) -> Result:
        """The function of hidden states and more, within a run: the output projection can be read, and trained."""
        ...

    def gather(self, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside the block these parameters are whole, to be read; a tensor taken of them there stays."""
        ...

    def local_shard(self, parameter: Tensor) -> Tensor:
        """What this rank holds of a parameter, to be read and written; flat where it is a piece."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a figure over what is held of the parameters, on all ranks where those are in pieces."""
        ...

    def all_reduce_max(self, value: int) -> int:
        """The largest of all ranks' values, where ranks must run equally many forward passes; else the value."""
        ...


class Unsharded:
    """Parameters that every rank holds whole."""

    def run_forward(self, function: Callable[..., Result], *given: Any) -> Result:
        return function(*given)

    def run_with_head(self, function: Callable[..., Result], hidden: Tensor, *given: Any) -> Result:
        return function(hidden, *given)

    def gather(self, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def local_shard(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values

    def all_reduce_max(self, value: int) -> int:
        return value


UNSHARDED = Unsharded()
_SHARDINGS: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()
_TRANSFORMS: WeakKeyDictionary[nn.Module, LogitTransform] = WeakKeyDictionary()


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
    def sharding(self) -> Sharding:
        """How the parameters lie on the ranks; all weights that share the module share it."""
        return _SHARDINGS.get(self.model, UNSHARDED)

    @sharding.setter
    def sharding(self, shards: Sharding) -> None:
        _SHARDINGS[self.model] = shards

    @property
    def head(self) -> nn.Parameter:
        """The output projection, [V, H]; in pieces outside of `Shards.with_head`, where it is sharded."""
        return self.causal.get_output_embeddings().weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The output projection's bias, [V], where it has one; in pieces wherever the projection is."""
        return getattr(self.causal.get_output_embeddings(), "bias", None)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The output projection and, where it has one, its bias."""
        return [self.head] if self.bias is None else [self.head, self.bias]

    @property
    def transform(self) -> LogitTransform:
        """How logits follow from head × hidden.

        Measured once per module, without adapters and before its parameters are sharded.  Raises BadData where it
        cannot be expressed.
        """
        if self.model not in _TRANSFORMS:
            with Weights(self.model, None).active() as causal:
                _TRANSFORMS[self.model] = measure_transform(causal)
        return evolve(_TRANSFORMS[self.model], bias=self.bias)

    def scores(self, sequences: PaddedSequences, rows: int | None = None) -> HiddenStateScores:
        """What these weights say of the counted tokens, over ids below `rows` (None: all); the head has no gradient."""
        hidden = self.hidden(sequences)
        with self.sharding.gather(self.head_parameters):
            head, transform = self.head.detach()[:rows], self.transform.first(rows).detached()
        return HiddenStateScores(hidden=hidden, head=head, transform=transform)

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The causal language model, with these weights switched on inside the block."""
        layers = list(adapter_layers(self.model))
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

    def hidden(self, sequences: PaddedSequences) -> Tensor:
        """Hidden states that predict the counted tokens.  -> [M, H] in the model's dtype."""
        return self.sharding.run_forward(self.selected_states, sequences)

    def selected_states(self, sequences: PaddedSequences) -> Tensor:
        """`hidden`, within a run of the shards."""
        with self.active() as causal:
            out = decoder(causal)(
                input_ids=sequences.input_ids,
                attention_mask=sequences.attention_mask,
                position_ids=sequences.positions,
                use_cache=False,
            )
        return out.last_hidden_state.flatten(0, 1)[sequences.predictor_index]

    @torch.no_grad()
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name; adapters are merged into copies, never into the model.

        Sharded parameters are whole one block at a time, so projections that an engine fuses come together.  All ranks
        go through to the end.
        """
        adapted = {id(adapted_parameter(layer)): layer for layer in adapter_layers(self.model)}
        for block in _blocks(self.causal).values():
            with self.sharding.gather(list(block.values())):
                for name, parameter in block.items():
                    if ".lora_" in name:
                        continue
                    layer = adapted.get(id(parameter))
                    # Adapters of several parameters of one module are nested.
                    own_name = name.replace(".base_layer", "")
                    yield own_name, parameter.detach() if layer is None else self.merged(layer)

    @torch.no_grad()
    def merged(self, layer: Any) -> Tensor:
        """A copy of the weights that an adapter changes, with these weights' adapter merged into it."""
        parameter = adapted_parameter(layer)
        if self.adapter is None:
            return parameter.detach()
        delta = layer.get_delta_weight(self.adapter).float()
        return (parameter.detach().float() + delta).to(parameter.dtype)


def _blocks(causal: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters by the repeated block that they belong to (`model.layers.0`); others stand alone."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in causal.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = name if number is None else ".".join(parts[: number + 1])
        found.setdefault(block, {})[name] = parameter
    return found


def adapter_layers(model: nn.Module) -> Iterator[Any]:
    """The layers that have adapters, as PEFT wraps them."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    yield from (module for module in model.modules() if isinstance(module, LoraLayer))


def adapted_parameter(layer: Any) -> nn.Parameter:
    """The base parameter that a layer's adapter changes: a weight, or experts stacked in one tensor."""
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
