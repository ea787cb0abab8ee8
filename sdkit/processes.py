"""Processes: telling them apart, killing them, and keeping idle workers for reuse.  Knows nothing of what they run."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, AnyStr, Generic

import psutil

CLOCK_ACCURACY = 0.05
"""Seconds by which two readings of one process's start may differ."""


def own_start() -> float:
    """Returns when this process started, in seconds since boot.  Number and start together identify a process."""
    return _start(psutil.Process())


def is_running(pid: Any, start: Any) -> bool:
    """Whether the process with this number and this start is running; False if either is unknown.

    `start` comes from `own_start`, or from an older sdkit as `BOOT_ID/CLOCK_TICKS`.
    """
    try:
        if isinstance(start, str):
            start = int(start.rpartition("/")[2]) / os.sysconf("SC_CLK_TCK")
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(_start(process) - start) < CLOCK_ACCURACY
    except (psutil.Error, TypeError, ValueError):
        return False


def _start(process: psutil.Process) -> float:
    # Unlike the time of day, the time since boot does not change when the clock is set.
    return process.create_time() - psutil.boot_time()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session of its own, with everything in its process group."""
    if process.poll() is None:  # not reaped, so its id is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class WorkerPool(Generic[AnyStr]):
    """Worker processes, each leading a session, that `start` starts on demand.

    They must exit when their standard input closes, so that they end with this process.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[AnyStr]]) -> None:
        self._start = start
        self._idle: queue.LifoQueue[subprocess.Popen[AnyStr]] = queue.LifoQueue()

    @contextlib.contextmanager
    def worker(self) -> Iterator[subprocess.Popen[AnyStr]]:
        """Yields a worker for exclusive use; kills it if the block raises."""
        worker = self._take()
        try:
            yield worker
        except BaseException:
            kill_group(worker)
            raise
        self._idle.put(worker)

    def _take(self) -> subprocess.Popen[AnyStr]:
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return self._start()
            if worker.poll() is None:
                return worker
