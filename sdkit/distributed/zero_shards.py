"""ZeRO stage 3: parameters that are here in pieces.  Knows DeepSpeed; knows no teacher and no loss.

Every rank holds a piece of every parameter; a module's are put together for its own forward and backward pass and let
go afterwards.  What reads parameters in any other way says so: `Shards` of weights.py is how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.distributed.collectives import all_reduce_max, all_reduce_sum, rank


class Root(nn.Module):
    """What is wrapped: a model beside a place where its output projection is at hand.

    Its forward pass runs any function, so that all that is done with the model happens within a pass that
    DeepSpeed sees begin.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projection = Projection()

    def forward(self, function: Callable[..., Any], *given: Any) -> Any:
        return function(*given)


class Projection(nn.Module):
    """Runs a function of hidden states; the output projection is whole in its forward and its backward pass.

    The gradient of the projection is formed in the forward pass (losses/chunks.py), but where it is added up the
    parameter must have its shape.
    """

    def forward(self, function: Callable[..., Any], hidden: Tensor, *given: Any) -> Any:
        return function(hidden, *given)


class Zero3Sharding:
    """The `Shards` (weights.py) of a model that stage 3 has taken apart.  All ranks call, in the same order."""

    def __init__(self, root: Root, head: Sequence[nn.Parameter]) -> None:
        import deepspeed

        self.root = root
        for parameter in head:
            deepspeed.zero.register_external_parameter(root.projection, parameter)
        kept = [n for n, p in root.named_parameters() if getattr(p, "ds_persist", False)]
        if kept:  # written pieces of these would not be seen
            raise RuntimeError(f"stage 3 keeps {kept[0]} whole between forward passes")

    def run_forward(self, function: Callable[..., Any], *given: Any) -> Any:
        return self.root(function, *given)

    def run_with_head(self, function: Callable[..., Any], hidden: Tensor, *given: Any) -> Any:
        return self.root.projection(function, hidden, *given)

    @contextlib.contextmanager
    def gather(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        import deepspeed

        apart = [p for p in parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(apart, modifier_rank=None, enabled=bool(apart)):
            yield

    def local_shard(self, parameter: Tensor) -> Tensor:
        """This rank's piece, flat.

        Written pieces count from the next time that the parameter is put together, so it must be apart.
        """
        piece: Any = parameter
        if piece.ds_status.name != "NOT_AVAILABLE":
            raise RuntimeError(
                f"{piece.ds_summary()} is whole: a write to its pieces would be lost"
            )
        return unpadded(parameter, piece.ds_tensor.data.view(-1))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values)

    def all_reduce_max(self, value: int) -> int:
        return all_reduce_max(value)


def unpadded(parameter: Tensor, piece: Tensor) -> Tensor:
    """This rank's piece of a parameter without what makes the last ones as long as the others: that is memory as it was.

    [K] -> a view of at most K elements, of none where ranks are many and the parameter is small.
    """
    whole: Any = parameter
    return piece[: max(whole.ds_numel - rank() * piece.numel(), 0)]


def settings(offload: Sequence[str]) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that is stage 3's own."""
    found: dict[str, Any] = {
        "stage": 3,
        # Small parameters that stay whole would not see what is written to their pieces (a moving teacher's).
        "stage3_param_persistence_threshold": 0,
    }
    if "parameters" in offload:
        found["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return found
