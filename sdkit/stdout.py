"""Keeps standard output for what sdkit itself prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what libraries print on standard output to standard error: stdout is sdkit's own."""
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("SDKIT_DEBUG") else _Nowhere()):
        yield


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
