"""Measures the machine: `python -m tools.bench.matrix_rate` prints matrix rates and memory bandwidth as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

SECONDS = 1.5
"""How long each rate is measured."""


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of `work` over SECONDS."""
    ends, best = time.perf_counter() + SECONDS, float("inf")
    while time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Print the operations per second of products of square matrices, and the bytes per second of a copy."""
    cuda = torch.cuda.is_available()
    device, n = ("cuda", 8192) if cuda else ("cpu", 1024)
    rates: dict[str, float | str] = {"device": torch.cuda.get_device_name() if cuda else "CPU"}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / _best_seconds(lambda a=a, b=b: a @ b)
    source = torch.empty(2**28 // 4, device=device).zero_()
    target = torch.empty_like(source)
    rates["bytes"] = 2 * 2**28 / _best_seconds(lambda: target.copy_(source))
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
