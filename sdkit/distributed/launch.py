"""`--processes N`: runs a command once per rank, on this machine.  Knows processes; imports no torch.

Other launchers (`torchrun`, `deepspeed`) work as well: a rank is defined by its environment variables alone.
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

from sdkit.devices import PASSIVE_THREADS
from sdkit.language.errors import ProcessDied, UnreadableInput
from sdkit.processes import kill_group, on_stop_signals

GRACE_SECONDS = 20.0
"""Seconds that the other ranks have to exit by themselves once one has failed."""
POLL_SECONDS = 0.05
RANK_LOST_CODE = ProcessDied.exit_code
"""The exit code of a rank that lost another rank; such a rank is never the cause."""

KILLERS = {
    signal.SIGKILL: "probably the kernel's out-of-memory killer: see `dmesg`",
    signal.SIGABRT: "probably NCCL's watchdog: ranks waited longer for each other than training.deadline_seconds",
}
"""By signal: what probably sent it to a rank."""


def launched() -> int | None:
    """Returns the number of ranks that a launcher started, this process included; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def must_launch(processes: int | None) -> bool:
    """Whether ranks must be started.  Raises UnreadableInput if a launcher has started another number of them."""
    ranks = launched()
    if ranks is not None and processes not in (None, ranks):
        raise UnreadableInput(
            f"--processes is {processes}, but a launcher has started {ranks}",
            hint="leave --processes out under a launcher",
        )
    return ranks is None and (processes or 1) > 1


def this_command() -> list[str]:
    """Returns the command line that starts this process again."""
    return [sys.executable, "-m", "sdkit", *sys.argv[1:]]


def launch(processes: int, command: Sequence[str]) -> int:
    """Run the command once per rank and wait for all ranks; returns the exit code.

    Rank 0 keeps the console.  SIGINT and SIGTERM are forwarded to every rank.  If a rank fails, the others have
    GRACE_SECONDS to exit, then they are killed.  Raises ProcessDied if a signal ended a rank.
    """
    with contextlib.ExitStack() as stack:
        ranks: list[_Rank] = []
        stack.callback(lambda: [kill_group(rank.process) for rank in ranks])
        port = _free_port()
        for number in range(processes):
            output = stack.enter_context(tempfile.TemporaryFile()) if number else None
            ranks.append(_Rank(number, _start(command, number, processes, port, output), output))
        with _forward_signals(ranks):
            ended = _wait(ranks)
        return _exit_code(ended)


@frozen(eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None  # its stdout and stderr; None: the console
    interrupts: list[float] = field(factory=list)

    def send_signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def _start(
    command: Sequence[str], number: int, processes: int, port: int, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    # In its own session, so that Ctrl-C reaches only the launcher, which forwards it once.
    return subprocess.Popen(
        command,
        env=os.environ | _environment(number, processes, port),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
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
        **PASSIVE_THREADS,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }


def end_with_parent() -> None:
    """Make the kernel kill this process once its parent has ended, in whatever way."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _forward_signals(ranks: list[_Rank]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to every rank."""

    def forward(number: int, _frame: Any) -> None:
        for rank in ranks:
            rank.interrupts.append(time.monotonic())
            rank.send_signal(number)

    with on_stop_signals(forward):
        yield


def _wait(ranks: list[_Rank]) -> list[tuple[_Rank, int]]:
    """Returns the ranks and their exit codes, in the order of exit, without those killed here for another's failure."""
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
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                kill_group(rank.process)
            return ended
        time.sleep(POLL_SECONDS)
    return ended


def _exit_code(ended: list[tuple[_Rank, int]]) -> int:
    """Returns the exit code of the rank that caused the failure, or 0; prints that rank's output.

    Raises ProcessDied if a signal ended it.
    """

    def priority(code: int) -> int:
        # A killed rank comes first.  SIGABRT is no cause: a process that lost its group may abort at exit, and NCCL aborts
        # one whose collective exceeds its time limit.
        if code == -signal.SIGABRT:
            return 3
        return 0 if code < 0 else 2 if code == RANK_LOST_CODE else 1

    failed = [(priority(code), rank, code) for rank, code in ended if code]
    if not failed:
        return 0 if ended else RANK_LOST_CODE
    _, rank, code = min(failed, key=lambda failure: (failure[0], failure[1].number))
    if rank.output is not None:
        rank.output.seek(0)
        sys.stderr.write(rank.output.read().decode(errors="replace")[-4000:])
    if code < 0:
        raise ProcessDied(
            f"rank {rank.number} was killed by {signal.Signals(-code).name}; the run ended with it",
            hint=KILLERS.get(signal.Signals(-code)),
        )
    return code
