"""What ranks say to each other.  Every rank must call, and all in the same order.  Knows no DeepSpeed and no run."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
RESPONSE_SECONDS = 3.0
"""Seconds that a rank has to say that it is there, once a collective has failed."""


def world_size() -> int:
    return torch.distributed.get_world_size()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def shard_indices(count: int) -> range:
    """The places out of `count` that are this rank's: every so many-th, so that a part of the whole is dealt evenly."""
    return range(rank(), count, world_size())


def all_reduce_max(value: int) -> int:
    """The largest value of all ranks."""
    if world_size() == 1:
        return value
    held = torch.tensor(int(value), device=_device())
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
    return int(held.item())


def all_gather_object(value: T) -> list[T]:
    """What each rank has, by rank; pickled, so for small things."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def gather_object(value: T) -> list[T]:
    """What each rank has, by rank, on the first; nothing on the others."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [value] * world_size()
    torch.distributed.gather_object(value, found if rank() == 0 else None)
    return found if rank() == 0 else []


def broadcast_object(value: T) -> T:
    """What the first rank has."""
    held: list[Any] = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(held)
    return held[0]


def sum_scalars(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The sums of named scalars over all ranks; a name may be missing where a rank had nothing to measure."""
    names = list(dict.fromkeys(name for named in all_gather_object(list(values)) for name in named))
    if not names:
        return {}
    nothing = torch.zeros((), device=_device())
    held = torch.stack([values.get(name, nothing).double() for name in names])
    return dict(zip(names, all_reduce_sum(held).tolist(), strict=True))


def _device() -> torch.device:
    """Where collectives take tensors from."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks.  Any shape; returns a new tensor."""
    if world_size() == 1:
        return values.clone()
    summed = values.to(_device(), copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(values.device)


def all_gather(values: Tensor) -> tuple[Tensor, slice]:
    """The values of all ranks, one rank after the other, and where this rank's stand.  [K] -> [sum of K], slice.

    K may differ from rank to rank, and be 0; every rank must call.
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
    """Who is still there when a collective has failed.

    Made while the group stands.  Leave the group then: that wakes ranks which wait for this one and not for the lost.
    """

    def __init__(self) -> None:
        from torch.distributed import distributed_c10d

        self._store: Any = distributed_c10d._get_default_store()
        self._own, self._silent = rank(), set(range(world_size()))
        self._deadline = time.monotonic() + RESPONSE_SECONDS
        # In a thread, as what is asked may be the lost rank's: the first rank keeps the marks.
        self._asking = threading.Thread(target=self._ask, daemon=True, name="sdkit roll call")
        self._asking.start()

    def missing_ranks(self) -> list[int]:
        """The ranks that have ended or are silent, after `ANSWER` seconds at most."""
        self._asking.join(max(self._deadline - time.monotonic(), 0.0))
        # Without the first rank nobody can say anything of the others.
        return [0] if 0 in self._silent else sorted(self._silent)

    def _ask(self) -> None:
        try:
            self._store.set(f"sdkit/here/{self._own}", "")
            while self._silent and time.monotonic() < self._deadline:
                here = {r for r in self._silent if self._store.check([f"sdkit/here/{r}"])}
                self._silent = self._silent - here
                time.sleep(0.05)
        except RuntimeError:
            return
