"""Bytes that a block of code allocates on the CPU, from torch's profiler: exact, and the same on every machine."""

import contextlib
import gc
from itertools import accumulate

import torch
from attrs import define
from torch.profiler import ProfilerActivity, profile


@define
class Ledger:
    """What a block allocated: the most bytes that were live at once.

    Freeing what is older than the block is not seen, nor what a collective's thread frees after it: a buffer or two.
    """

    peak: int = 0


@contextlib.contextmanager
def ledger():
    """Yields a Ledger, which is filled at the end of the block."""
    book = Ledger()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield book
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # below 0: freed
    book.peak = max(accumulate(changes), default=0)


def live_storages():
    """The storages of all tensors of this process, by address."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in storages}


def bytes_since(before):
    """Bytes of all storages of this process that are not among `before`, which live_storages() returned earlier."""
    return sum(storage.nbytes() for address, storage in live_storages().items() if address not in before)
