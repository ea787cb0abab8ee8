"""`--processes N`: one command once for each rank, on this machine.  Knows processes; imports no torch.

Another launcher (`torchrun`, `deepspeed`) does the same with its own means: what makes a rank is the environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from attrs import field, frozen

from sdkit.language.errors import ProcessDied, UnreadableInput

PATIENCE = 20.0
"""Seconds that the other ranks have to end by themselves once one has failed."""
POLL = 0.05
LOST = ProcessDied.exit_code
"""How a rank ends that has lost another: never the first cause."""


def launched() -> int | None:
    """How many ranks a launcher started, this process among them; None: there was none."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def must_launch(processes: int | None) -> bool:
    """Whether ranks must be started; raises UnreadableInput where a launcher has started another number."""
    ranks = launched()
    if ranks is not None and processes not in (None, ranks):
        raise UnreadableInput(
            f"--processes is {processes}, but a launcher has started {ranks}",
            hint="leave --processes out under a launcher",
        )
    return ranks is None and (processes or 1) > 1


def this_command() -> list[str]:
    """What started this process, to be started again."""
    return [sys.executable, "-m", "sdkit", *sys.argv[1:]]


def launch(processes: int, command: Sequence[str]) -> int:
    """Run the command as so many ranks and wait for all of them; returns the exit code.

    The first rank has the console.  SIGINT and SIGTERM go to every rank.  Where a rank fails the others have a
    while to end, then they are killed; raises ProcessDied where a signal ended a rank.
    """
    with contextlib.ExitStack() as stack:
        ranks: list[_Rank] = []
        stack.callback(lambda: [rank.kill() for rank in ranks])
        port = _free_port()
        for number in range(processes):
            said = stack.enter_context(tempfile.TemporaryFile()) if number else None
            ranks.append(_Rank(number, _start(command, number, processes, port, said), said))
        with _forwarded(ranks):
            ended = _wait(ranks)
        return _verdict(ended)


@frozen(eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None  # what it wrote; None: it has the console
    interrupts: list[float] = field(factory=list)

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the rank and what it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _start(
    command: Sequence[str], number: int, processes: int, port: int, said: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once.
    return subprocess.Popen(
        command,
        env=os.environ | _environment(number, processes, port),
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def _environment(number: int, processes: int, port: int) -> Mapping[str, str]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }


def end_with_parent() -> None:
    """Ask the kernel to end this process when the launcher is gone, however that went."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _forwarded(ranks: list[_Rank]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to every rank."""

    def forward(number: int, _frame: Any) -> None:
        for rank in ranks:
            rank.interrupts.append(time.monotonic())
            rank.send(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[_Rank]) -> list[tuple[_Rank, int]]:
    """Every rank with how it ended, in the order of ending; what was killed here for another's failure is left out."""
    ended: list[tuple[_Rank, int]] = []
    running = list(ranks)
    deadline: float | None = None
    while running:
        for rank in list(running):
            if (code := rank.process.poll()) is not None:
                ended.append((rank, code))
                running.remove(rank)
        failed = any(code for _, code in ended) or any(len(r.interrupts) > 1 for r in running)
        if failed and deadline is None:
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.kill()
            return ended
        time.sleep(POLL)
    return ended


def _verdict(ended: list[tuple[_Rank, int]]) -> int:
    """The exit code of the rank that failed first, or 0; says what only that rank knows."""

    def blame(code: int) -> int:
        # A process that has lost its group may abort on its way out.
        return 0 if code < 0 and code != -signal.SIGABRT else 2 if code == LOST else 1

    failed = [(blame(code), rank, code) for rank, code in ended if code]
    if not failed:
        return 0 if ended else LOST
    _, rank, code = min(failed, key=lambda each: (each[0], each[1].number))
    if rank.said is not None:
        rank.said.seek(0)
        sys.stderr.write(rank.said.read().decode(errors="replace")[-4000:])
    if code < 0:
        raise ProcessDied(
            f"rank {rank.number} was ended by {signal.Signals(-code).name}; the run ended with it",
            hint="SIGKILL that nobody sent is the kernel's, when memory runs out: see `dmesg`"
            if -code == signal.SIGKILL
            else None,
        )
    return code
