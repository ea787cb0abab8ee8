"""What sdkit prints: warnings in one form, on the first rank, and nothing of what libraries print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def is_first_rank() -> bool:
    """Whether this is the first or only rank, also before the process group exists; others print nothing but errors."""
    return os.environ.get("RANK", "0") == "0"


def print_warning(console: Console, text: str, advice: str | None = None) -> None:
    """Print a warning and, on a line of its own, what to do about it."""
    from rich.markup import escape

    console.print(f"[yellow]warning[/]: {escape(text)}", highlight=False)
    if advice is not None:
        console.print(f"  = {escape(advice)}", highlight=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, discard what libraries print to stdout; with SDKIT_DEBUG set, redirect it to stderr."""
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("SDKIT_DEBUG") else _NullWriter()):
        yield


class _NullWriter:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
