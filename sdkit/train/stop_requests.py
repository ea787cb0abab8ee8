"""Requests to stop: SIGINT and SIGTERM are noted, and heeded where a run can be taken up again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from sdkit.distributed import collectives


class EvaluationAbandoned(BaseException):
    """Out of work that a request to stop makes pointless; no handler of mere exceptions may keep it."""


class StopRequests:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._abandon_at_once = False

    def handle_signal(self, number: int, _frame: Any) -> None:
        """The handler of both signals."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._abandon_at_once:
            raise EvaluationAbandoned

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work in here changes nothing: a request raises LeftAtOnce.  Several ranks come to its end together instead."""
        self._abandon_at_once = collectives.world_size() == 1
        try:
            if self.asked and self._abandon_at_once:
                raise EvaluationAbandoned
            yield
        finally:
            self._abandon_at_once = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Note SIGINT and SIGTERM instead of dying from them; a second SIGINT interrupts at once."""
    stop = StopRequests()
    before = {n: signal.signal(n, stop.handle_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
