"""Runs programs in isolated processes: starts `jail`, sends it one test case after another, and kills it if it hangs."""

from __future__ import annotations

import contextlib
import json
import math
import platform
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
from sdkit.processes import WorkerPool, kill_group
from sdkit.rewards.jail.messages import receive, send
from sdkit.rewards.program_tests import Test

JAIL = Path(__file__).with_name("jail")
MACHINES = ("x86_64", "aarch64")
GRACE = 5.0
"""Seconds after the time limit until a jail that did not end its program is killed."""


@frozen(kw_only=True)
class Outcome:
    """The outcome of one test."""

    result: Any = None
    """The output, the return value, or whether the asserts passed."""
    failure: str | None = None
    """Why there is no result, as a sentence."""
    stderr: str = ""
    """If the program ended by itself: the end of its standard error, with the traceback."""


class Sandbox:
    """Opens jails for programs.  Raises BadEnvironment if this machine does not support the isolation."""

    def __init__(self, limits: PythonTests) -> None:
        self.limits = limits
        self._workers = WorkerPool(_start)
        if sys.platform != "linux" or platform.machine() not in MACHINES:
            raise BadEnvironment(
                "rewards of kind python_tests need Linux on x86_64 or aarch64: "
                f"this is {sys.platform} on {platform.machine()}"
            )
        with self.open_jail("print(1)", seconds=60.0) as jail:
            outcome = jail.run_test(Test(kind="stdin", input="", expected="1"), 30.0)
        if outcome.failure:
            reason = outcome.stderr.strip().rpartition("\n")[2] or outcome.failure
            raise BadEnvironment(f"not even print(1) can be run within the limits: {reason}")

    @contextlib.contextmanager
    def open_jail(self, program: str, seconds: float) -> Iterator[Jail]:
        """Yields a jail for one program; kills it if it is still running `GRACE` after `seconds`."""
        with self._workers.worker() as process:
            watchdog = threading.Timer(seconds + GRACE, kill_group, (process,))
            watchdog.daemon = True
            watchdog.start()
            try:
                jail = Jail(process, self._job(program), self.limits)
                yield jail
                jail.close()
            finally:
                watchdog.cancel()
                watchdog.join()  # while it waits for the process that it killed, `poll` would report that process as running

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
        # Not isolated mode (-I): it would ignore PYTHONHASHSEED.
        [sys.executable, "-P", "-s", "-S", "-X", "utf8", str(JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        cwd="/",
        bufsize=0,
        start_new_session=True,  # Ctrl-C must reach only the trainer; and the group can be killed as one
    )


class Jail:
    """One running jail.  Raises BadEnvironment if the isolation cannot be set up."""

    def __init__(self, process: subprocess.Popen[bytes], job: dict[str, Any], limits: PythonTests) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._stdin, self._stdout = process.stdin.fileno(), process.stdout.fileno()
        self._limits = limits
        try:
            send(self._stdin, job)
            problem = receive(self._stdout)["failed"]
        except (EOFError, OSError):
            problem = "it ended at once"
        if problem and limits.isolation == "namespaces":
            raise BadEnvironment(
                "rewards of kind python_tests run programs in namespaces of their own, without a "
                f"network, which this machine does not allow: {problem}",
                hint="isolation: without_namespaces runs them behind limits and a system call "
                "filter alone: they can then read what you can read",
            )
        if problem:
            raise BadEnvironment(f"programs cannot be run behind a system call filter: {problem}")

    def close(self) -> None:
        """Asks the jail to end; it may have ended already."""
        with contextlib.suppress(OSError):
            send(self._stdin, None)

    def run_test(self, test: Test, seconds: float) -> Outcome:
        """Runs one test for at most `seconds`."""
        cpu_limit = self._limits.cpu_seconds
        if test.cpu_seconds is not None:
            cpu_limit = min(cpu_limit, math.ceil(test.cpu_seconds))
        password = secrets.token_hex(16)
        case = {
            "kind": test.kind,
            "seconds": seconds,
            "cpu_seconds": cpu_limit,
            "given": None if test.kind == "asserts" else test.input,
            "function": test.function,
        }
        try:
            send(self._stdin, case)
            if test.kind == "asserts":  # sent separately: the program must not see them
                send(self._stdin, test.input)
                send(self._stdin, password)
            report = receive(self._stdout)
        except (EOFError, OSError):
            return Outcome(failure="It was ended with its sandbox.")
        return self._read(test, report, password, self._timeout_text(seconds), cpu_limit)

    def _timeout_text(self, seconds: float) -> str:
        if seconds < self._limits.seconds:
            return f"All tests together took more than {self._limits.total_seconds:g} s."
        return f"It took more than {seconds:g} s."

    def _read(self, test: Test, report: dict[str, Any], password: str, timeout: str, cpu_limit: int) -> Outcome:
        stderr = report["err"]
        match report["ended"]:
            case "time":
                return Outcome(failure=timeout)
            case "output":
                return Outcome(failure=f"It wrote more than {self._limits.output_kib} KiB.")
            # The kernel enforces the limit in its own ticks, which need not agree with the time that it reports.
            case "signal" if report["code"] == -signal.SIGKILL and report["cpu"] > cpu_limit / 2:
                return Outcome(failure=f"It took more than {cpu_limit} s of processor time.")
            case "signal":
                name = signal.Signals(-report["code"]).name
                return Outcome(failure=f"It was ended by {name}.")
        if test.kind == "asserts":
            passed = report["says"] == f".{password}"
            return _result_if(passed, True, "It ended before its tests did.", stderr)
        if test.kind == "stdin":
            code = report["code"]
            return _result_if(code == 0, report["out"], f"It ended with exit code {code}.", stderr)
        return _parse_return_value(report["says"], stderr)


def _result_if(succeeded: bool, result: Any, failure: str, stderr: str) -> Outcome:
    return Outcome(result=result) if succeeded else Outcome(failure=failure, stderr=stderr)


def _parse_return_value(text: str, stderr: str) -> Outcome:
    """Parses the value from JSON, so that no class of the program affects its comparison."""
    try:
        return Outcome(result=json.loads(text))
    except (ValueError, RecursionError):
        return Outcome(failure="It ended before the function returned.", stderr=stderr)
