"""Programs that nobody has read, run in a sandbox.  Knows processes and pipes; knows nothing of tests or rewards.

What holds where user namespaces are to be had: no network, no files but the interpreter's and the libraries', all
read-only, a small folder in memory to write, no sight of other processes, no privileges.  Without them, which the
caller must allow, only what the limits and the user's permissions say.  In both: limits on time, memory, files,
processes and output, and nothing that the program started outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Literal

from attrs import frozen

JAIL = Path(__file__).with_name("rewards_jail.py")
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the same program ends the same way every time
BOX = "/box"  # the program's folder, as the jail makes it
MIB = 2**20
GRACE = 3.0  # seconds until a sandbox that does not end itself is killed from outside

Walls = Literal["all", "all but network", "limits only"]


@frozen(kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float  # by the clock
    memory_mib: int  # address space of each process
    processes: int = 16  # threads too
    open_files: int = 64
    file_mib: int = 32  # each file; all files together take as much again
    output_kib: int = 64  # stdout and stderr, each


@frozen(kw_only=True)
class Ended:
    """How a program ended.  `stopped` says why it did not end by itself; `late` that time was why."""

    stdout: str
    stderr: str
    report: bytes  # what it wrote to file number 3
    exit_code: int | None
    stopped: str | None
    late: bool


class Refused(Exception):
    """The machine does not allow such a sandbox."""


@functools.cache
def refusal(walls: Walls) -> str | None:
    """Why this machine allows no such sandbox; None where it does.  Tried once, with a real program."""
    try:
        done = run("print('ok')", Limits(seconds=20, memory_mib=512), walls)
    except Refused as error:
        return str(error)
    if done.stdout == "ok\n" and done.exit_code == 0:
        return None
    return f"a trial program did not run: {done.stopped or done.stderr.strip()[-200:]}"


def run(
    program: str, limits: Limits, walls: Walls, *, stdin: str = "", output_extra: int = 0
) -> Ended:
    """Run a Python program, as program.py, and wait for its end; `output_extra` more bytes may be printed.

    Never takes longer than the limit and a few seconds.  Raises Refused where the sandbox cannot be built.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="sdkit-box-", ignore_cleanup_errors=True)
        )
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        status, status_end = _pipe(stack)
        report, report_end = _pipe(stack)
        job = _job(folder, limits, walls) | {"status": status_end.fileno()}
        job["report"] = report_end.fileno()
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-B", str(JAIL), json.dumps(job)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status_end.fileno(), report_end.fileno()),
            env={},
            cwd="/",
            start_new_session=True,
        )
        with process:
            status_end.close()
            report_end.close()
            return _watched(process, limits, status, report, output_extra)


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return (
        stack.enter_context(open(reading, "rb", buffering=0)),
        stack.enter_context(open(writing, "wb", buffering=0)),
    )


def _job(folder: str, limits: Limits, walls: Walls) -> dict[str, Any]:
    """What the first process of the sandbox is told."""
    isolated = walls != "limits only"
    prefixes = {sys.base_prefix, sys.base_exec_prefix, os.path.dirname(PYTHON)}
    if not isolated:
        os.chmod(folder, 0o777)  # root's programs run as nobody
    return {
        "parent": os.getpid(),
        "folder": folder,
        "isolated": isolated,
        "network": walls == "all but network",
        "interpreter": sorted(prefixes - {"/"}),
        "disk_mib": 2 * limits.file_mib,
        "seconds": limits.seconds,
        "command": [PYTHON, *FLAGS, f"{BOX if isolated else folder}/program.py"],
        "environment": ENVIRONMENT,
        "limits": {
            "CPU": math.ceil(limits.seconds),
            "AS": limits.memory_mib * MIB,
            "FSIZE": limits.file_mib * MIB,
            "NOFILE": limits.open_files,
            "NPROC": limits.processes,
            "CORE": 0,
        },
    }


# ── what comes out of it ──────────────────────────────────────────────────────────────────────


def _watched(
    process: subprocess.Popen[bytes],
    limits: Limits,
    status: IO[bytes],
    report: IO[bytes],
    output_extra: int,
) -> Ended:
    """Read what the program says, up to a bound, until its keeper says how it ended or time is up."""
    assert process.stdout is not None
    assert process.stderr is not None
    most = limits.output_kib * 1024 + output_extra
    bounds = {process.stdout: most, process.stderr: most, report: MIB, status: MIB}
    heard = {stream: bytearray() for stream in bounds}
    try:
        too_much = _listen(heard, bounds, status, time.monotonic() + limits.seconds + GRACE)
    finally:
        _end(process)
    told = json.loads(heard[status].splitlines()[0]) if heard[status] else {}
    if "refused" in told:
        raise Refused(told["refused"])
    late = bool(told.get("late")) or told.get("signal") == signal.SIGXCPU
    return Ended(
        stdout=heard[process.stdout][:most].decode(errors="replace"),
        stderr=heard[process.stderr][:most].decode(errors="replace"),
        report=bytes(heard[report]),
        exit_code=told.get("exit"),
        stopped=_stopped(told, limits, too_much, late),
        late=late,
    )


def _listen(
    heard: dict[IO[bytes], bytearray],
    bounds: dict[IO[bytes], int],
    status: IO[bytes],
    until: float,
) -> bool:
    """Fill `heard`; returns whether a stream went beyond its bound."""
    with selectors.DefaultSelector() as selector:
        for stream in heard:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        ended = False
        while selector.get_map() and time.monotonic() < until:
            # After the end only what stands in the pipes is read: a stray process may hold them open.
            ready = selector.select(0 if ended else max(0.0, until - time.monotonic()))
            if ended and not ready:
                return False
            for key, _ in ready:
                stream: Any = key.fileobj
                part = os.read(stream.fileno(), 65536)
                heard[stream] += part
                if len(heard[stream]) > bounds[stream]:
                    return True
                if not part:
                    selector.unregister(stream)
                    ended = ended or stream is status
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of the sandbox lives on: its first process kills what it knows of, then all are killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stopped(told: dict[str, Any], limits: Limits, too_much: bool, late: bool) -> str | None:
    if too_much:
        return f"it printed more than {limits.output_kib} KiB"
    if late:
        return f"it took more than {limits.seconds:g} s"
    if "signal" in told:
        return f"it was ended by signal {told['signal']} ({signal.Signals(told['signal']).name})"
    return None if "exit" in told else "it was ended"
