"""Programs in a process of their own behind walls: starts `rewards_jail`, asks it case after case, and ends it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import queue
import secrets
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import PythonTests
from sdkit.rewards.jail.messages import receive, send
from sdkit.rewards.program_tests import Test

JAIL = Path(__file__).with_name("jail")
MACHINES = ("x86_64", "aarch64")
GRACE = 5.0
"""Seconds after its time until a jail that did not end a program by itself is ended."""


@frozen(kw_only=True)
class Outcome:
    """What came of one test."""

    result: Any = None
    """What was printed or returned, or that asserts were passed."""
    failure: str | None = None
    """Why it ended before it came to that, in a sentence."""
    stderr: str = ""
    """Where it ended by itself: the end of what it wrote to standard error, its traceback included."""


class Sandbox:
    """Where programs run.  Raises BadEnvironment where this machine has no such walls."""

    def __init__(self, limits: PythonTests) -> None:
        self.limits = limits
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()
        if sys.platform != "linux" or platform.machine() not in MACHINES:
            raise BadEnvironment(
                "rewards of kind python_tests need Linux on x86_64 or aarch64: "
                f"this is {sys.platform} on {platform.machine()}"
            )
        with self.open_jail("print(1)", seconds=60.0) as jail:
            outcome = jail.run_test(Test(kind="stdin", input="", expected="1"), 30.0)
        if outcome.failure:
            why = outcome.stderr.strip().rpartition("\n")[2] or outcome.failure
            raise BadEnvironment(f"not even print(1) can be run within the limits: {why}")

    @contextlib.contextmanager
    def open_jail(self, program: str, seconds: float) -> Iterator[Jail]:
        """A jail for one program, which is ended from here where it has not done so shortly after these seconds."""
        process = self._process()
        watch = threading.Timer(seconds + GRACE, _kill_group, (process,))
        watch.daemon = True
        watch.start()
        try:
            jail = Jail(process, self._job(program), self.limits)
            yield jail
            jail.close()
        except BaseException:
            _kill_group(process)
            raise
        finally:
            watch.cancel()
            watch.join()  # while it waits for a process that it has ended, `poll` would take that for a living one
        self._idle.put(process)

    def _process(self) -> subprocess.Popen[bytes]:
        """A process that opens jails; one that has ended is of no more use."""
        while True:
            try:
                process = self._idle.get_nowait()
            except queue.Empty:
                return _start()
            if process.poll() is None:
                return process

    def _job(self, program: str) -> dict[str, Any]:
        limits = self.limits
        paths = sysconfig.get_paths()
        return {
            "program": program,
            "namespaces": limits.isolation == "namespaces",
            "paths": sorted({paths["purelib"], paths["platlib"]}) if limits.packages else [],
            "memory_bytes": limits.memory_mib << 20,
            "file_bytes": limits.files_mib << 20,
            "output_bytes": limits.output_kib << 10,
        }


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # Not isolated mode (-I): the environment is ours, and says how texts are hashed.
        [sys.executable, "-P", "-s", "-S", "-X", "utf8", str(JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        cwd="/",
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for the trainer; and a group to be ended at once
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process, its jail and the program in that: none of them can leave the group."""
    if process.poll() is None:  # its id is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Jail:
    """One running jail.  Raises BadEnvironment where its walls cannot be built."""

    def __init__(
        self, process: subprocess.Popen[bytes], job: dict[str, Any], limits: PythonTests
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        self._limits = limits
        try:
            send(self._to, job)
            failed = receive(self._from)["failed"]
        except (EOFError, OSError):
            failed = "it ended at once"
        if failed and limits.isolation == "namespaces":
            raise BadEnvironment(
                "rewards of kind python_tests run programs in namespaces of their own, without a "
                f"network, which this machine does not allow: {failed}",
                hint="isolation: without_namespaces runs them behind limits and a system call "
                "filter alone: they can then read what you can read",
            )
        if failed:
            raise BadEnvironment(f"programs cannot be run behind a system call filter: {failed}")

    def close(self) -> None:
        """Have it end; there is nothing to be ended where it has already."""
        with contextlib.suppress(OSError):
            send(self._to, None)

    def run_test(self, test: Test, seconds: float) -> Outcome:
        """What comes of one test within `seconds`."""
        allowed = self._limits.cpu_seconds
        if test.cpu_seconds is not None:
            allowed = min(allowed, math.ceil(test.cpu_seconds))
        word = secrets.token_hex(16)
        case = {
            "kind": test.kind,
            "seconds": seconds,
            "cpu_seconds": allowed,
            "given": None if test.kind == "asserts" else test.input,
            "function": test.function,
        }
        try:
            send(self._to, case)
            if test.kind == "asserts":  # not part of the case: the program must not find them
                send(self._to, test.input)
                send(self._to, word)
            found = receive(self._from)
        except (EOFError, OSError):
            return Outcome(failure="It was ended with its sandbox.")
        return self._read(test, found, word, self._late(seconds), allowed)

    def _late(self, seconds: float) -> str:
        if seconds < self._limits.seconds:
            return f"All tests together took more than {self._limits.total_seconds:g} s."
        return f"It took more than {seconds:g} s."

    def _read(
        self, test: Test, found: dict[str, Any], word: str, late: str, allowed: int
    ) -> Outcome:
        errors = found["err"]
        match found["ended"]:
            case "time":
                return Outcome(failure=late)
            case "output":
                return Outcome(failure=f"It wrote more than {self._limits.output_kib} KiB.")
            # The kernel ends it by its own ticks, which need not agree with what it then says was used.
            case "signal" if found["code"] == -signal.SIGKILL and found["cpu"] > allowed / 2:
                return Outcome(failure=f"It took more than {allowed} s of processor time.")
            case "signal":
                name = signal.Signals(-found["code"]).name
                return Outcome(failure=f"It was ended by {name}.")
        if test.kind == "asserts":
            passed = found["says"] == f".{word}"
            return _unless(passed, True, "It ended before its tests did.", errors)
        if test.kind == "stdin":
            code = found["code"]
            return _unless(code == 0, found["out"], f"It ended with exit code {code}.", errors)
        return _returned(found["says"], errors)


def _unless(fine: bool, got: Any, otherwise: str, errors: str) -> Outcome:
    return Outcome(result=got) if fine else Outcome(failure=otherwise, stderr=errors)


def _returned(says: str, errors: str) -> Outcome:
    """A value, read anew: out here it owes nothing to the classes of the program."""
    try:
        return Outcome(result=json.loads(says))
    except (ValueError, RecursionError):
        return Outcome(failure="It ended before the function returned.", stderr=errors)
