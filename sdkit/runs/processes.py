"""Whether a process that wrote its number down is still the one of that number."""

from __future__ import annotations

import functools
import os
from pathlib import Path

PROC = Path("/proc")


@functools.cache
def own_mark() -> str | None:
    """What tells this process from every other that ever has its number."""
    return _mark(os.getpid())


def alive(pid: object, mark: object) -> bool:
    """Whether the process of this number is the one that left this mark; False where that cannot be told."""
    return isinstance(pid, int) and mark is not None and _mark(pid) == mark


def _mark(pid: int) -> str | None:
    """The boot and the moment in which a process began; None where there is none, or no Linux."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        # The command's name stands in brackets and may hold blanks; the start is the 20th word behind it.
        words = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else f"{boot}/{words[19]}"
