"""Identifies a process by its number and its start, since the system reuses numbers."""

from __future__ import annotations

import functools
import os
from pathlib import Path

PROC = Path("/proc")


@functools.cache
def own_mark() -> str | None:
    """A text that distinguishes this process from any other with its number; None if there is no /proc."""
    return _mark(os.getpid())


def alive(pid: object, mark: object) -> bool:
    """Whether the process with this number is running and has this mark; False if that is unknown."""
    return isinstance(pid, int) and mark is not None and _mark(pid) == mark


def _mark(pid: int) -> str | None:
    """The boot id and the start time of a process; None if it does not run, or if there is no /proc."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        # The command's name is in brackets and may contain blanks; the start time is the 20th word after it.
        words = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else f"{boot}/{words[19]}"
