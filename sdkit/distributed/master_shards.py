"""Shards tensors as ZeRO stages 1 and 2 shard the optimizer's masters.  Knows nothing of DeepSpeed, teachers or losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdkit.distributed.collectives import all_gather_object, all_reduce_sum, rank
from sdkit.models.weights import Sharding


class MasterSharding(Sharding):
    """Every rank has the complete tensors and updates its own part of each, the part of which it has the masters."""

    def __init__(self, tensors: Mapping[str, Tensor], own_parts: Mapping[str, slice]) -> None:
        """`own_parts`: this rank's part of each flattened tensor, by name.  Every rank must call."""
        by_rank = all_gather_object({name: own_parts[name] for name in tensors})
        self._tensors = tensors
        self._parts = {id(tensor): [parts[name] for parts in by_rank] for name, tensor in tensors.items()}

    def local_shard(self, parameter: Tensor) -> Tensor:
        return parameter.detach().view(-1)[self._parts[id(parameter)][rank()]]

    def complete(self, parameter: Tensor) -> None:
        self._exchange(parameter, parameter.detach().view(-1))

    def to_file(self, parameter: Tensor, shard: Tensor) -> Tensor:
        flat = shard.new_empty(parameter.numel())
        flat[self._parts[id(parameter)][rank()]] = shard
        self._exchange(parameter, flat)
        return flat.view(parameter.shape).cpu() if rank() == 0 else flat[:0]

    def from_file(self, parameter: Tensor, stored: Tensor) -> Tensor:
        return stored.view(-1)[self._parts[id(parameter)][rank()]]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values)

    def _exchange(self, parameter: Tensor, flat: Tensor) -> None:
        """Give every rank the other ranks' parts of `flat`."""
        for source, part in enumerate(self._parts[id(parameter)]):
            if part.stop > part.start:
                torch.distributed.broadcast(flat[part].view(torch.uint8), src=source)
