"""What a check is given, and how it measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

GIB = 2**30


class Skipped(Exception):
    """The check cannot run here."""


@frozen(kw_only=True)
class Setup:
    """Where a check works and on which device."""

    folder: Path  # empty, the check's own
    on_cpu: bool
    miniature: bool  # the smallest sizes, for a dry run
    name: str  # of the check

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.on_cpu else torch.device("cuda", 0)

    def needs_gpu(self) -> None:
        """Raise Skipped on a CPU."""
        if self.on_cpu:
            raise Skipped("needs a GPU")


Check = Callable[[Setup], dict[str, Any]]
"""Returns the figures of a check, with `ok: False` where they are wrong; what it raises is a failure."""


def measure(setup: Setup, work: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Return the median milliseconds of the work after one run to warm up, and on a GPU its peak above what was there."""
    work()
    if setup.on_cpu:
        return {"milliseconds": _timed(work)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = sorted(_timed(lambda: (work(), torch.cuda.synchronize())) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated() - before
    return {"milliseconds": round(times[repeats // 2], 3), "peak_gib": round(peak / GIB, 3)}


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return round((time.perf_counter() - started) * 1000, 3)
