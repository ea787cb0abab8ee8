"""Records SIGINT and SIGTERM, so that a run stops at a point where it can be resumed; answers them at once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from sdkit.distributed import collectives
from sdkit.processes import on_stop_signals

Notify = Callable[[str], None]


class EvaluationAbandoned(BaseException):
    """Leaves an evaluation at once after a stop request.  A BaseException, so that `except Exception` does not catch it."""


class StopRequests:
    """Whether this process was asked to stop, and what it is doing."""

    def __init__(self, notify: Notify) -> None:
        self.asked = False
        self._notify = notify
        self._abandon_at_once = False
        self._work, self._end = "the current work", 0.0

    def handle_signal(self, number: int, _frame: Any) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            again = "; again to abort" if number == signal.SIGINT else ""
            self._notify(self._answer() + again)
        self.asked = True
        if self._abandon_at_once:
            raise EvaluationAbandoned

    def _answer(self) -> str:
        if self._abandon_at_once:
            return "stopping: the evaluation is abandoned, --resume repeats it"
        left = self._end - time.perf_counter()
        return f"stopping after {self._work}" + (f", {left:.0f} s left" if left >= 0.5 else "")

    @contextlib.contextmanager
    def during(self, work: str, seconds: float | None = None) -> Iterator[None]:
        """In this context a stop request is answered with what is finished first; `seconds`: how long that takes."""
        before = self._work, self._end
        self._work, self._end = work, time.perf_counter() + (seconds or 0.0)
        try:
            yield
        finally:
            self._work, self._end = before

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
def stop_requests(notify: Notify) -> Iterator[StopRequests]:
    """Record SIGINT and SIGTERM instead of ending the process; a second SIGINT interrupts at once.

    `notify` receives the answer to the first request.
    """
    stop = StopRequests(notify)
    with on_stop_signals(stop.handle_signal):
        yield stop
