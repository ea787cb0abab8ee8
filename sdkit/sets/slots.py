"""Divides the devices, or the cores, of this machine among runs at the same time."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from sdkit.devices import PASSIVE_THREADS
from sdkit.language.errors import UnreadableInput, counted
from sdkit.plan.machine import has_gpu

DEVICES = "CUDA_VISIBLE_DEVICES"


def make_slots(parallel: int, processes: int) -> list[Mapping[str, str]]:
    """Returns the environment of each of `parallel` runs of `processes` ranks: devices of its own, or a share of the cores.

    Raises UnreadableInput under a launcher, or if there are too few GPUs.
    """
    if "WORLD_SIZE" in os.environ:
        raise UnreadableInput(
            "a launcher has started this command, but a set of runs starts its ranks itself",
            hint="call sdkit without a launcher: --processes starts the ranks of each run",
        )
    if parallel == 1:
        return [{}]
    if not has_gpu():
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (parallel * processes))))
        return [{"OMP_NUM_THREADS": threads, **PASSIVE_THREADS} for _ in range(parallel)]
    devices = visible_devices()
    needed = parallel * processes
    if len(devices) < needed:
        raise UnreadableInput(
            f"{parallel} runs at the same time with {counted(processes, 'rank')} each need {needed} GPUs, "
            f"but there {'is' if len(devices) == 1 else 'are'} {len(devices)}",
            hint="lower --parallel or --processes",
        )
    parts = (devices[i * processes : (i + 1) * processes] for i in range(parallel))
    return [{DEVICES: ",".join(part)} for part in parts]


def visible_devices() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if DEVICES in os.environ:
        return [name.strip() for name in os.environ[DEVICES].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
