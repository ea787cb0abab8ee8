"""Processes: telling them apart and killing them; worker processes and threads.  Knows nothing of what they run."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, AnyStr, Generic, TypeVar

import psutil

T = TypeVar("T")

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


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler`, then restore what handled them before."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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


class DaemonThreads:
    """Threads that run submitted functions, first in, first out.

    Unlike those of a ThreadPoolExecutor, they do not keep the process alive: a thread cannot be killed.
    """

    def __init__(self, count: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put((function, future))
        return future

    def end(self, seconds: float) -> None:
        """End the threads after all submitted functions; wait for each up to `seconds`."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            function, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # raised again where the result is awaited
                    future.set_exception(error)
