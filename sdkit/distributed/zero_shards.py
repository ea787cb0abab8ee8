"""ZeRO stage 3: models with sharded parameters.  Knows DeepSpeed; knows no teacher and no loss.

Every rank holds a shard of every parameter.  DeepSpeed gathers a module's parameters for its forward and backward pass
and releases them afterwards.  All other access goes through `Sharding` (models/weights.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.distributed.collectives import all_reduce_max, all_reduce_sum, rank
from sdkit.models.weights import Sharding

SMALL = 100_000
"""Norms, biases and low-rank factors of up to this many elements are gathered together, once for a forward or backward pass.
DeepSpeed's own way is to keep them gathered (`stage3_param_persistence_threshold`, with the same default)."""
SMALL_SHARE = 1 / 250
"""The largest share of its model that such a parameter may have: of a tiny model, most stays sharded."""


class Root(nn.Module):
    """The module that DeepSpeed wraps: a model, and a submodule in which its output projection is gathered.

    Its forward pass runs any function, so that every use of the model happens inside a forward pass that DeepSpeed
    hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projection = Projection()

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Projection(nn.Module):
    """Runs a function of hidden states; the output projection is gathered in its forward and backward pass.

    The gradient of the projection is computed in the forward pass (losses/chunks.py), but the parameter must have its
    full shape where that gradient is accumulated.
    """

    def forward(self, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        return function(hidden, *args)


class ShardedParameters(Sharding):
    """The parameters of a model that is sharded by ZeRO stage 3 and cannot run yet."""

    in_step = True

    @contextlib.contextmanager
    def gather(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        import deepspeed

        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None, enabled=bool(sharded)):
            yield

    def local_shard(self, parameter: Tensor) -> Tensor:
        # A write takes effect when the parameter is gathered next, so it must not be gathered now.
        sharded: Any = parameter
        if sharded.ds_status.name != "NOT_AVAILABLE":
            raise RuntimeError(f"{sharded.ds_summary()} is gathered: a write to its shards would be lost")
        return unpadded(parameter, sharded.ds_tensor.data.view(-1))

    def full_shape(self, parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def write(self, parameter: Tensor, values: Tensor) -> None:
        sharded: Any = parameter
        shard, start = self.local_shard(parameter), rank() * sharded.ds_tensor.numel()
        shard.copy_(values.flatten()[start : start + shard.numel()])

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values)

    def all_reduce_max(self, value: int) -> int:
        return all_reduce_max(value)


class Zero3Sharding(ShardedParameters):
    """A model under ZeRO stage 3, with DeepSpeed's hooks: it can run."""

    def __init__(
        self, root: Root, head: Sequence[nn.Parameter], release_all: Callable[[], None] = lambda: None
    ) -> None:
        import deepspeed

        self.root = root
        self._release_all = release_all
        for parameter in head:
            deepspeed.zero.register_external_parameter(root.projection, parameter)
        for parameter in _small_parameters(root):
            deepspeed.zero.register_external_parameter(root, parameter)
        persistent = [n for n, p in root.named_parameters() if getattr(p, "ds_persist", False)]
        if persistent:  # writes to their shards would have no effect
            raise RuntimeError(f"stage 3 keeps {persistent[0]} gathered between forward passes")

    def run_forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.root(function, *args)

    def run_with_head(self, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        return self.root.projection(function, hidden, *args)

    def release(self) -> None:
        self._release_all()


def _small_parameters(root: nn.Module) -> list[nn.Parameter]:
    parameters: list[Any] = list(root.parameters())
    largest = min(SMALL, SMALL_SHARE * sum(p.ds_numel for p in parameters))
    return [parameter for parameter in parameters if parameter.ds_numel <= largest]


def unpadded(parameter: Tensor, shard: Tensor) -> Tensor:
    """Returns this rank's shard of a parameter without its padding, which is uninitialized memory.

    [K] -> a view of at most K elements; of none if the parameter has too few for this rank.
    """
    sharded: Any = parameter
    return shard[: max(sharded.ds_numel - rank() * shard.numel(), 0)]


def settings(offload: Sequence[str]) -> dict[str, Any]:
    """Returns DeepSpeed's `zero_optimization` settings for stage 3."""
    config: dict[str, Any] = {
        "stage": 3,
        # Small parameters would stay gathered, and writes to their shards (by a moving teacher) would be lost.  See SMALL.
        "stage3_param_persistence_threshold": 0,
    }
    if "parameters" in offload:
        config["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config
