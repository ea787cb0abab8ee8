"""The choice of device, a GPU if torch finds one, unless SDKIT_DEVICE is `cpu`; and the settings of a CPU.  Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os

from sdkit.language.errors import UnreadableInput

VARIABLE = "SDKIT_DEVICE"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names of two settings of its allocator (malloc.h)."""
WAIT_POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
PASSIVE_THREADS = {WAIT_POLICY: "PASSIVE", SPINS: "0"}
"""For processes that share cores: threads that spin at barriers slow the others to a crawl."""
BRIEF_SPINS = "10000"
"""Turns that a thread waits before it sleeps, some 40 µs: longer than most gaps between two operations of a model."""


def cpu_requested() -> bool:
    """Whether the environment asks for the CPU.  Raises UnreadableInput if SDKIT_DEVICE has a value other than `cpu`."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "cpu"):
        raise UnreadableInput(
            f"{VARIABLE} is {value}, expected cpu",
            hint="unset it to use a GPU where there is one; CUDA_VISIBLE_DEVICES chooses among several",
        )
    return value == "cpu"


def hide_gpus_if_requested() -> None:
    """Hide the GPUs from this process and those that it starts, if SDKIT_DEVICE is `cpu`.  Call before torch is imported."""
    if cpu_requested():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def set_thread_waits() -> None:
    """Let threads spin briefly before they sleep; those of a launcher's ranks, which share cores, sleep at once.

    Does nothing where the user has chosen.  Call before torch is imported.

    Measured with two cores: a step takes a tenth less than with threads that sleep at once; two runs that share them take
    two fifths more, and three times as long with torch's own default.
    """
    if not {WAIT_POLICY, SPINS} & os.environ.keys():
        os.environ |= PASSIVE_THREADS
        if "WORLD_SIZE" not in os.environ:
            os.environ[SPINS] = BRIEF_SPINS


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, which otherwise goes back to the kernel, page by page.

    For a process that computes on the CPU.  Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(setting, 2**31 - 1)
