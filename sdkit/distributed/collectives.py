"""Collective operations.  Every rank must call them, in the same order.  Knows nothing of DeepSpeed or runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdkit.models.device import rank_device

T = TypeVar("T")
RESPONSE_SECONDS = 3.0
"""Seconds that a rank has to answer the roll call after a collective has failed."""


def world_size() -> int:
    return torch.distributed.get_world_size()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    """Wait until all ranks have called this."""
    torch.distributed.barrier()


def shard_indices(count: int) -> range:
    """Returns this rank's share of `range(count)`.  Strided, so that any prefix of it is spread evenly over the ranks."""
    return range(rank(), count, world_size())


def all_reduce_max(value: int) -> int:
    """Returns the largest value over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(int(value), device=rank_device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def all_gather_object(value: T) -> list[T]:
    """Returns the values of all ranks, in rank order.  They are pickled, so keep them small."""
    gathered: list[Any] = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def gather_object(value: T) -> list[T]:
    """Returns the values of all ranks, in rank order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [value] * world_size()
    torch.distributed.gather_object(value, gathered if rank() == 0 else None)
    return gathered if rank() == 0 else []


def broadcast_object(value: T) -> T:
    """Returns rank 0's value on every rank."""
    values: list[Any] = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def sum_scalars(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the sums of named scalars over all ranks.  A name that a rank lacks counts as zero there."""
    names = list(dict.fromkeys(name for named in all_gather_object(list(values)) for name in named))
    if not names:
        return {}
    zero = torch.zeros((), device=rank_device())
    stacked = torch.stack([values.get(name, zero).double() for name in names])
    return dict(zip(names, all_reduce_sum(stacked).tolist(), strict=True))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Returns the sum over all ranks, as a new tensor of the same shape."""
    if world_size() == 1:
        return values.clone()
    summed = values.to(rank_device(), copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(values.device)


def all_gather(values: Tensor) -> tuple[Tensor, slice]:
    """Returns the values of all ranks, concatenated in rank order, and the slice of this rank.  [K] -> [sum of K], slice.

    K may differ between ranks and may be 0; every rank must call.
    """
    size = values.numel()
    if world_size() == 1:
        return values, slice(0, size)
    sizes = torch.zeros(world_size(), dtype=torch.long, device=values.device)
    sizes[rank()] = size
    edges = [0, *all_reduce_sum(sizes).cumsum(0).tolist()]
    own = slice(edges[rank()], edges[rank() + 1])
    joined = values.new_zeros(edges[-1])
    joined[own] = values
    return all_reduce_sum(joined), own


class RollCall:
    """Finds the lost ranks after a collective has failed.

    Create it while the process group still exists, then leave the group: that wakes the ranks that wait for this one
    rather than for the lost one.
    """

    def __init__(self) -> None:
        from torch.distributed import distributed_c10d

        self._store: Any = distributed_c10d._get_default_store()
        self._own, self._silent = rank(), set(range(world_size()))
        self._deadline = time.monotonic() + RESPONSE_SECONDS
        # In a thread, because the store hangs if rank 0, which hosts it, is the lost one.
        self._thread = threading.Thread(target=self._poll, daemon=True, name="sdkit roll call")
        self._thread.start()

    def missing_ranks(self) -> list[int]:
        """Returns the ranks that do not answer, after at most RESPONSE_SECONDS."""
        self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        # Rank 0 hosts the store: without it nothing is known of the others.
        return [0] if 0 in self._silent else sorted(self._silent)

    def _poll(self) -> None:
        try:
            self._store.set(f"sdkit/here/{self._own}", "")
            while self._silent and time.monotonic() < self._deadline:
                present = {r for r in self._silent if self._store.check([f"sdkit/here/{r}"])}
                self._silent = self._silent - present
                time.sleep(0.05)
        except RuntimeError:
            return
