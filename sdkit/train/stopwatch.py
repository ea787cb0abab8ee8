"""Measures how long the phases of a step take, on the device that computes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds of named phases.

    On a GPU a phase lasts as long as its work does: calls return once the work is launched, so the times are those of
    events in the device's stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._phases: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a part of the phase."""
        start = self._mark()
        yield
        self._phases.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase, after waiting for the device."""
        if self._on_gpu and self._phases:
            self._phases[-1][-1].synchronize()
        totals: dict[str, float] = {}
        for name, start, end in self._phases:
            seconds = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            totals[name] = totals.get(name, 0.0) + seconds
        return totals

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
