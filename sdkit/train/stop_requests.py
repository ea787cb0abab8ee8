"""Records SIGINT and SIGTERM, so that a run stops at a point where it can be resumed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from sdkit.distributed import collectives


class EvaluationAbandoned(BaseException):
    """Leaves an evaluation at once after a stop request.  A BaseException, so that `except Exception` does not catch it."""


class StopRequests:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._abandon_at_once = False

    def handle_signal(self, number: int, _frame: Any) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._abandon_at_once:
            raise EvaluationAbandoned

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """In this context a stop request raises EvaluationAbandoned, as nothing is lost.

        With several ranks it does not: they finish the work together.
        """
        self._abandon_at_once = collectives.world_size() == 1
        try:
            if self.asked and self._abandon_at_once:
                raise EvaluationAbandoned
            yield
        finally:
            self._abandon_at_once = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Record SIGINT and SIGTERM instead of ending the process; a second SIGINT interrupts at once."""
    stop = StopRequests()
    before = {n: signal.signal(n, stop.handle_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
