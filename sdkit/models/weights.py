"""One set of weights of a causal language model: activate it, run it, export it.

The student and every local teacher are `Weights`.  With adapters, several sets share one module and differ in the active
adapter; no other code switches adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from attrs import evolve
from torch import Tensor, nn

from sdkit.batches import HiddenStateScores, LogitTransform, PaddedSequences
from sdkit.models.logit_transform import decoder, measure_transform
from sdkit.models.prefix import states_by_group
from sdkit.models.quantization import dequantized

Result = TypeVar("Result")

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept a mask over all queries and keys.  Flash kernels read such a mask as one of padding:
an index error on a CPU, on a GPU the end of the CUDA context."""

STUDENT_ADAPTER = "default"
TEACHER_ADAPTER = "teacher"


class Sharding:
    """How a model's parameters are sharded over ranks, and how to read and write them: here every rank has all of them.

    Zero3Sharding (distributed/zero_shards.py) overrides the methods for ZeRO stage 3.  Under stages 1 and 2 a teacher's
    average is sharded by MasterSharding (distributed/master_shards.py).  Every rank must call, in the same order.
    """

    in_step = False
    """Whether all ranks must run equally many forward passes, because each pass gathers parameters from all of them."""

    def run_forward(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call the function inside a forward pass of the model and return its result."""
        return function(*args)

    def run_with_head(self, function: Callable[..., Result], hidden: Tensor, *args: Any) -> Result:
        """Call the function of hidden states inside `run_forward`, with the output projection gathered and trainable."""
        return function(hidden, *args)

    def gather(self, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Gather these parameters for reading inside the block; tensors taken from them stay valid afterwards."""
        return contextlib.nullcontext()

    def local_shard(self, parameter: Tensor) -> Tensor:
        """Returns this rank's shard of a parameter, to read and write; flat if the parameter is sharded."""
        return parameter.detach()

    def device_of(self, parameter: Tensor) -> torch.device:
        """Returns the device on which forward passes use a parameter."""
        return parameter.device

    def complete(self, parameter: Tensor) -> None:
        """Make a parameter complete again after every rank has written to its `local_shard`."""

    def to_file(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """Returns what this rank's checkpoint file stores of a tensor that is sharded like `parameter`."""
        return shard

    def from_file(self, parameter: Tensor, stored: Tensor) -> Tensor:
        """Returns this rank's shard of a tensor that `to_file` stored."""
        return stored

    def full_shape(self, parameter: Tensor) -> torch.Size:
        """Returns the shape of a parameter as if it were not sharded."""
        return parameter.shape

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Set a parameter to `values`, which has the parameter's full shape; every rank must pass the same."""
        parameter.detach().copy_(values)

    def release(self) -> None:
        """Release the parameters that a backward pass without an optimizer step has left gathered."""

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Returns the sum of per-shard values over all ranks if parameters are sharded; otherwise the values."""
        return values

    def all_reduce_max(self, value: int) -> int:
        """Returns the largest value over all ranks if they must run equally many forward passes; otherwise the value."""
        return value


UNSHARDED = Sharding()
_SHARDINGS: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()
_TRANSFORMS: WeakKeyDictionary[nn.Module, LogitTransform] = WeakKeyDictionary()
_TAKES_PREFIX: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Weights:
    """A causal language model with one active adapter, with none (`adapter=None`), or without any adapters.

    `foreign` weights belong to another model than the student: engines that serve the student cannot load them.
    """

    def __init__(self, model: nn.Module, adapter: str | None = STUDENT_ADAPTER, *, foreign: bool = False) -> None:
        self.model = model
        self.adapter = adapter
        self.foreign = foreign
        base: Any = model
        self.causal: Any = base.get_base_model() if self.has_adapters else base

    @property
    def has_adapters(self) -> bool:
        """Whether the module has adapters, active or not."""
        return hasattr(self.model, "peft_config")

    @property
    def sharding(self) -> Sharding:
        """How the parameters are sharded; shared by all `Weights` of the same module."""
        return _SHARDINGS.get(self.model, UNSHARDED)

    @sharding.setter
    def sharding(self, sharding: Sharding) -> None:
        _SHARDINGS[self.model] = sharding

    @property
    def takes_prefix(self) -> bool:
        """Whether a pass may run a prefix that all rows share apart (models/prefix.py).

        False until it is measured, and under ZeRO stage 3, which would gather every parameter once more on all ranks.
        """
        return _TAKES_PREFIX.get(self.model, False) and not self.sharding.in_step

    @takes_prefix.setter
    def takes_prefix(self, measured: bool) -> None:
        _TAKES_PREFIX[self.model] = measured

    @property
    def takes_mask(self) -> bool:
        """Whether a pass may have a mask over all queries and keys, as rows that share a prompt do."""
        return getattr(self.causal.config, "_attn_implementation", None) in MASKED_ATTENTION

    @property
    def head(self) -> nn.Parameter:
        """The output projection, [V, H]; if sharded, complete only inside `Sharding.run_with_head`."""
        return self.causal.get_output_embeddings().weight

    @property
    def head_shape(self) -> torch.Size:
        """The full shape of the output projection, (V, H)."""
        return self.sharding.full_shape(self.head)

    @property
    def embedding_rows(self) -> int:
        """The number of token ids that the model has an embedding for."""
        return self.sharding.full_shape(self.causal.get_input_embeddings().weight)[0]

    @property
    def bias(self) -> nn.Parameter | None:
        """The output projection's bias, [V], if it has one; sharded like the projection."""
        return getattr(self.causal.get_output_embeddings(), "bias", None)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The output projection and its bias, if it has one."""
        return [self.head] if self.bias is None else [self.head, self.bias]

    @property
    def transform(self) -> LogitTransform:
        """The transform from head × hidden to logits.

        Measured once per module, without adapters.  Raises BadData where it cannot be expressed.
        """
        if self.model not in _TRANSFORMS:
            (_TRANSFORMS[self.model],) = self.sharding.run_forward(Weights(self.model, None)._measure_transform)
        return evolve(_TRANSFORMS[self.model], bias=self.bias)

    def _measure_transform(self) -> tuple[LogitTransform]:
        with self.active() as causal:
            return (measure_transform(causal, self.head_shape),)  # a tuple: DeepSpeed searches the result for tensors

    def scores(self, sequences: PaddedSequences, rows: int | None = None) -> HiddenStateScores:
        """Returns scores of the counted tokens, over ids below `rows` (None: all); the head gets no gradient."""
        hidden = self.hidden(sequences)
        with self.sharding.gather(self.head_parameters):
            head, transform = self.head.detach()[:rows], self.transform.first(rows).detached()
        return HiddenStateScores(hidden=hidden, head=head, transform=transform)

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Yields the causal language model with these weights active inside the block."""
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
        """Returns the hidden states that predict the counted tokens, [M, H] in the model's dtype."""
        return self.sharding.run_forward(self.selected_states, sequences)

    def selected_states(self, sequences: PaddedSequences) -> Tensor:
        """Returns `hidden`; call it inside `Sharding.run_forward`.

        Raises ValueError for rows that share a prompt if the model's attention takes no mask for them.
        """
        if sequences.attention_mask is not None and not self.takes_mask:
            raise ValueError(
                f"rows share prompts, but {self.causal.config._attn_implementation} takes no mask for them"
            )
        with self.active() as causal:
            if self.takes_prefix and any(group.prefix for group in sequences.prefix_groups):
                return states_by_group(decoder(causal), sequences)
            out = decoder(causal)(
                input_ids=sequences.input_ids,
                attention_mask=sequences.attention_mask,
                position_ids=sequences.positions,
                use_cache=False,
            )
        return out.last_hidden_state.flatten(0, 1)[sequences.predictor_index]

    @torch.no_grad()
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor under its Hugging Face name; adapters are merged into copies, never into the model.

        Sharded parameters are gathered one block at a time, so projections that an engine fuses come together.  Every
        rank must iterate to the end.
        """
        adapted = {id(adapted_parameter(layer)): layer for layer in adapter_layers(self.model)}
        for block in _blocks(self.causal).values():
            with self.sharding.gather(list(block.values())):
                for name, parameter in block.items():
                    if ".lora_" in name:
                        continue
                    layer = adapted.get(id(parameter))
                    # PEFT nests the adapters of several parameters of one module.
                    own_name = name.replace(".base_layer", "")
                    yield own_name, dequantized(parameter) if layer is None else self.merged(layer)

    @torch.no_grad()
    def merged(self, layer: Any) -> Tensor:
        """Returns a copy of the weights under an adapter layer, with the active adapter merged in."""
        base = dequantized(adapted_parameter(layer))
        if self.adapter is None:
            return base
        delta = layer.get_delta_weight(self.adapter).float()
        return (base.float() + delta).to(base.dtype)


def _blocks(causal: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Returns the parameters grouped by repeated block (`model.layers.0`); other parameters form their own groups."""
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in causal.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = name if number is None else ".".join(parts[: number + 1])
        blocks.setdefault(block, {})[name] = parameter
    return blocks


def adapter_layers(model: nn.Module) -> Iterator[Any]:
    """Yields the layers that PEFT has wrapped with adapters."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    yield from (module for module in model.modules() if isinstance(module, LoraLayer))


def adapted_parameter(layer: Any) -> nn.Parameter:
    """Returns the base parameter that a layer's adapter modifies: a weight, or experts stacked in one tensor."""
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
