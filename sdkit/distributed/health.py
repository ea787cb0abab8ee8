"""Ends ranks that would wait forever for a lost one.  Knows processes and the store; knows nothing of runs.

Under NCCL a collective does not end with a rank that it needs: the others wait in a kernel, and their Python code never
gets to run.  So a thread of every rank counts in the process group's store, and watches whether the next rank still counts.
The first rank that is found lost, or that fails and says so, is written to the store for all.  The others then have
GRACE_SECONDS to end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from attrs import frozen

from sdkit.distributed.collectives import rank, world_size
from sdkit.language.errors import ProcessDied, RunFailed

INTERVAL = 2.0
"""Seconds between two counts."""
SILENCE_SECONDS = 60.0
"""Seconds without a count after which a rank is lost.  A single call into a library may keep its thread from counting."""
GRACE_SECONDS = 10.0
"""Seconds that a rank has to end by itself once another is lost: less than the launcher allows."""
CLOSING_SECONDS = 60.0
"""Seconds that a rank has to close its models and engines after it has failed."""
LOST = "sdkit/lost"


@frozen
class _Exit:
    """When the process must have ended, and with what."""

    deadline: float
    code: int
    message: str
    lost: int


class HealthMonitor:
    """The thread of one rank.  `store` is shared by all ranks."""

    def __init__(self, store: Any, own: int, ranks: int) -> None:
        self.on_exit: Callable[[str], None] = lambda message: None
        self._store = store.clone()  # a connection of its own: a wait of the main thread blocks the other one
        self._store.set_timeout(timedelta(seconds=SILENCE_SECONDS))
        self._own, self._next = own, (own + 1) % ranks
        self._count, self._heard = -1, time.monotonic()
        self._exit: _Exit | None = None
        self._failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sdkit health")
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(INTERVAL)

    def fail(self, code: int, message: str, *, is_cause: bool) -> None:
        """Give this rank CLOSING_SECONDS to end; tell the others about it unless it fails because of them."""
        if self._failing:
            return
        self._failing = True
        self._exit = _Exit(time.monotonic() + CLOSING_SECONDS, code, message, self._own)
        if is_cause:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set(LOST, "", str(self._own))

    def lost_rank(self) -> int | None:
        """Returns the first rank that was lost; None if none is known to be."""
        try:
            return int(self._store.get(LOST)) if self._store.check([LOST]) else None
        except RuntimeError:
            return 0  # it hosts the store

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            if self._exit is None:
                lost = self._find_lost_rank()
                if lost is not None and not self._failing:
                    message = f"lost rank {lost}, which ended or was silent for {SILENCE_SECONDS:.0f} s"
                    self._exit = _Exit(time.monotonic() + GRACE_SECONDS, ProcessDied.exit_code, message, lost)
            elif time.monotonic() > self._exit.deadline:
                self._end_process(self._exit)

    def _find_lost_rank(self) -> int | None:
        with contextlib.suppress(RuntimeError):  # then `lost_rank` says so
            self._store.add(f"sdkit/count/{self._own}", 1)
            count = self._store.add(f"sdkit/count/{self._next}", 0)
            if count != self._count:
                self._count, self._heard = count, time.monotonic()
            elif time.monotonic() - self._heard > SILENCE_SECONDS:
                self._store.compare_set(LOST, "", str(self._next))
        return self.lost_rank()

    def _end_process(self, end: _Exit) -> None:
        print(f"rank {self._own}: error: {end.message}", file=sys.stderr, flush=True)
        if self._own == 0 or end.lost == 0:
            with contextlib.suppress(Exception):
                self.on_exit(end.message)
        os._exit(end.code)  # the main thread may never return to Python


_monitor: HealthMonitor | None = None


def start() -> None:
    """Watch the ranks of the process group, if there are several and they are not watched yet."""
    global _monitor
    if world_size() > 1 and _monitor is None:
        from torch.distributed import distributed_c10d

        _monitor = HealthMonitor(distributed_c10d._get_default_store(), rank(), world_size())


def stop() -> None:
    """Stop watching."""
    global _monitor
    if _monitor is not None:
        _monitor.stop()
        _monitor = None


def on_exit(record: Callable[[str], None]) -> None:
    """Call `record` with the reason before a process that hangs is ended: on rank 0, or on all others if it is lost."""
    if _monitor is not None:
        _monitor.on_exit = record


def fail(code: int = RunFailed.exit_code, message: str = "this rank failed", *, is_cause: bool = True) -> None:
    """Announce that this rank fails, so that the others do not wait for it; its first call counts.

    Call it before anything is closed: a rank that does not end within CLOSING_SECONDS is ended with this code.
    """
    if _monitor is not None:
        _monitor.fail(code, message, is_cause=is_cause)


def lost_rank() -> int | None:
    """Returns the first rank that was lost; None if none is known to be."""
    return _monitor.lost_rank() if _monitor is not None else None
