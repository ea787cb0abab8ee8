"""Reserves standard output for sdkit's own output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def is_first_rank() -> bool:
    """Whether this is the first or only rank, also before the process group exists; others print nothing but errors."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, discard what libraries print to stdout; with SDKIT_DEBUG set, redirect it to stderr."""
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("SDKIT_DEBUG") else _NullWriter()):
        yield


class _NullWriter:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
