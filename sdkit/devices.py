"""The choice of device: a GPU if torch finds one, unless SDKIT_DEVICE is `cpu`.  Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os

from sdkit.language.errors import UnreadableInput

VARIABLE = "SDKIT_DEVICE"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names of two settings of its allocator (malloc.h)."""


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


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, which otherwise goes back to the kernel, page by page.

    For a process that computes on the CPU.  Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(setting, 2**31 - 1)
