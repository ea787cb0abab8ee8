"""Trajectories of a user's environment, each in a process of its own, asked side by side and killed when they are late."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from attrs import define, field, frozen

from sdkit.environments import worker
from sdkit.language.errors import BadData, Place

LONGEST_ANSWER = 2**20
"""Bytes of an answer; a longer one is a fault."""
Request = Mapping[str, Any]
"""A call, as the worker takes it."""
START_SECONDS = 60.0
"""How long importing the user's file may take."""


@frozen(kw_only=True)
class Fault:
    """Why a call has no value."""

    message: str
    line: int | None = None  # of the user's file
    raised: bool = False  # by the user's code, in a process that still answers
    misfit: bool = False  # the code does not take these arguments, or must not return such a value


class EnvironmentFault(BadData):
    """A call of an environment failed, and `on_error: stop_run` ends the run."""

    def __init__(
        self, message: str, *, call: str, fault: Fault, hint: str | None = None, place: Place | None = None
    ) -> None:
        super().__init__(message, hint=hint, place=place)
        self.call = call  # the name of the method or the tool
        self.fault = fault


@define(eq=False)
class Process:
    """The process of one trajectory."""

    pid: int
    connection: socket.socket
    received: bytes = b""
    seconds: float = 0.0  # of its calls so far
    fault: Fault | None = None  # the first one; the process is gone then

    def fail(self, fault: Fault) -> None:
        """Kill the process for a fault."""
        self.fault = fault
        self.end()

    def end(self) -> None:
        """Kill the process, with everything in its group."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


@define(eq=False)
class _Job:
    """Calls of one process that wait for their answers."""

    process: Process
    requests: list[Request]  # not sent yet
    ends: float  # when the time of the turn is over
    values: list[Any] = field(factory=list)
    sent: float = 0.0  # when the last call was sent
    deadline: float = math.inf  # of the call that was sent

    def lateness(self, host: Host) -> str:
        turn = self.deadline == self.ends
        return f"no answer within {host.turn_seconds if turn else host.seconds:g} s{' of the turn' if turn else ''}"


@define(eq=False)
class Host:
    """The user's file, loaded in a process that forks one for each trajectory."""

    file: str  # as written in the spec; what messages call it
    path: Path
    code: Mapping[str, Any]  # the class or the functions, as the worker takes them
    seconds: float  # for one call
    turn_seconds: float | None = None  # for all calls of a turn
    survives: bool = False  # a process goes on after a call that raised
    ours: bool = False  # whether the file is sdkit's: messages give no line of it
    start_seconds: float = START_SECONDS
    python: str = sys.executable
    tools: Sequence[Mapping[str, Any]] = field(default=(), init=False)  # their schemas, once the file is loaded
    _server: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _channel: socket.socket | None = field(default=None, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)  # the server answers one thread at a time

    def start(self) -> None:
        """Start the server.  Raises BadData if the user's file cannot be loaded, or the interpreter not run."""
        ours, theirs = socket.socketpair()
        folder = Path(__file__).parents[2] if self.ours else self.path.parent
        words = [str(self.path), json.dumps(self.code), json.dumps([str(folder)])]
        try:
            self._server = subprocess.Popen(
                [self.python, "-P", worker.__file__, *words],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise BadData(f"cannot run {self.python}: {error.strerror}") from error
        finally:
            theirs.close()
        ours.settimeout(self.start_seconds)
        self._channel = ours
        answer = self._answer_of_server()
        if "error" in answer:
            self.close()
            line = None if self.ours else answer.get("line")
            raise BadData(
                f"{self.file} cannot be loaded: {answer['error']}", place=Place(self.file, line, 1) if line else None
            )
        self.tools = answer["value"]

    def fork(self) -> Process:
        """Return a new process.  Raises BadData if the server has ended."""
        assert self._channel is not None, "start the host first"
        ours, theirs = socket.socketpair()
        with self._lock:
            with theirs, contextlib.suppress(OSError):  # a server that has ended gives no answer
                socket.send_fds(self._channel, [b"f"], [theirs.fileno()])
            answer = self._answer_of_server()
        if "error" in answer:
            raise BadData(f"the process that loaded {self.file}: {answer['error']}")
        ours.settimeout(self.seconds)  # of a request that the process does not read
        return Process(answer["value"], ours)

    def call(self, calls: Sequence[tuple[Process, Sequence[Request]]]) -> list[list[Any]]:
        """Return the values of each process's calls, or Faults; processes run side by side, the calls of one in order.

        A process that is late, has ended or, unless it `survives`, raised, is killed: the rest of its calls are faults.
        """
        ends = math.inf if self.turn_seconds is None else time.monotonic() + self.turn_seconds
        jobs = [_Job(process, list(requests), ends) for process, requests in calls]
        with selectors.DefaultSelector() as selector:
            for job in jobs:
                if self._send(job):
                    selector.register(job.process.connection, selectors.EVENT_READ, job)
            while waiting := [key.data for key in selector.get_map().values()]:
                first = min(job.deadline for job in waiting)
                for key, _ in selector.select(max(0.0, first - time.monotonic())):
                    answer = self._read(key.data.process)
                    if answer is not None:
                        selector.unregister(key.fileobj)
                        if self._take(key.data, answer):
                            selector.register(key.fileobj, selectors.EVENT_READ, key.data)
                for key in list(selector.get_map().values()):
                    if time.monotonic() >= key.data.deadline:
                        selector.unregister(key.fileobj)
                        self._take(key.data, Fault(message=key.data.lateness(self)))
        return [job.values for job in jobs]

    def close(self) -> None:
        """End the server and all of its processes."""
        if self._channel:
            self._channel.close()
        if self._server:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._channel = self._server = None

    def _send(self, job: _Job) -> bool:
        """Send a job's next request; False if it has none, or its process has a fault."""
        if job.process.fault:
            job.values += [job.process.fault] * len(job.requests)
            job.requests.clear()
        if not job.requests:
            return False
        with contextlib.suppress(OSError):  # a process that has ended answers with the end of its stream
            job.process.connection.sendall(json.dumps(job.requests.pop(0), default=str).encode() + b"\n")
        job.sent = time.monotonic()
        job.deadline = min(job.sent + self.seconds, job.ends)
        return True

    def _take(self, job: _Job, answer: tuple[Any] | Fault) -> bool:
        """Note an answer, and send the next request; False if there is none."""
        job.process.seconds += time.monotonic() - job.sent
        if isinstance(answer, Fault) and not (answer.raised and self.survives):
            job.process.fail(answer)
        job.values.append(answer if isinstance(answer, Fault) else answer[0])
        return self._send(job)

    def _read(self, process: Process) -> tuple[Any] | Fault | None:
        """The value of a process's answer, in a tuple, or its fault; None if the answer is not complete."""
        try:
            part = process.connection.recv(2**16)
        except OSError:
            part = b""
        process.received += part
        if not part:
            return Fault(message="its process has ended")
        line, newline, rest = process.received.partition(b"\n")
        if len(line) > LONGEST_ANSWER:
            return Fault(message=f"an answer of more than {LONGEST_ANSWER} bytes")
        if not newline:
            return None
        process.received = rest
        try:
            answer = json.loads(line)
            if "error" in answer:
                return Fault(message=answer["error"], line=answer["line"], raised=True, misfit=answer["misfit"])
            return (answer["value"],)
        except (ValueError, KeyError, TypeError):
            return Fault(message="an answer that is no JSON")

    def _answer_of_server(self) -> dict[str, Any]:
        assert self._channel is not None
        received = b""
        while not received.endswith(b"\n"):
            try:
                part = self._channel.recv(2**16)
            except OSError:
                part = b""
            if not part:
                return {"error": f"no answer within {self.start_seconds:g} s, or its process has ended"}
            received += part
        return json.loads(received)


def finite(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
