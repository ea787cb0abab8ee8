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
START_SECONDS = 60.0
"""How long importing the user's file may take."""


@frozen(kw_only=True)
class Fault:
    """Why a call has no value."""

    message: str
    line: int | None = None  # of the user's file


@define(eq=False)
class Process:
    """The process of one trajectory."""

    pid: int
    connection: socket.socket
    received: bytes = b""
    seconds: float = 0.0  # of its calls so far
    fault: Fault | None = None  # the first one; the process is gone then

    def end(self) -> None:
        """Kill the process, with everything in its group."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


@define(eq=False)
class Host:
    """The user's file, loaded in a process that forks one for each trajectory."""

    file: str  # as written in the spec; what messages call it
    path: Path
    name: str
    arguments: Mapping[str, Any]
    seconds: float  # for one call
    ours: bool = False  # whether the file is sdkit's: messages give no line of it
    start_seconds: float = START_SECONDS
    python: str = sys.executable
    _server: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _channel: socket.socket | None = field(default=None, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)  # the server answers one thread at a time

    def start(self) -> None:
        """Start the server.  Raises BadData if the user's file cannot be loaded."""
        ours, theirs = socket.socketpair()
        folder = Path(__file__).parents[2] if self.ours else self.path.parent
        words = [str(self.path), self.name, json.dumps(dict(self.arguments)), json.dumps([str(folder)])]
        self._server = subprocess.Popen(
            [self.python, "-P", worker.__file__, *words],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
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

    def call(self, calls: Sequence[tuple[Process, Mapping[str, Any]]]) -> list[Any]:
        """Return the value of each call, or a Fault; all run side by side, each within `seconds`.

        A process with a fault is killed.
        """
        started = time.monotonic()
        deadline = started + self.seconds
        values: dict[int, tuple[Any] | Fault] = {}
        with selectors.DefaultSelector() as selector:
            for number, (process, request) in enumerate(calls):
                if process.fault is None:
                    with contextlib.suppress(OSError):  # a process that has ended answers with the end of its stream
                        process.connection.sendall(json.dumps(request, default=str).encode() + b"\n")
                    selector.register(process.connection, selectors.EVENT_READ, number)
            while selector.get_map():
                events = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in events:
                    value = self._read(calls[key.data][0])
                    if value is not None:
                        selector.unregister(key.fileobj)
                        values[key.data] = value
                        calls[key.data][0].seconds += time.monotonic() - started
                if not events and time.monotonic() >= deadline:
                    for key in selector.get_map().values():
                        values[key.data] = Fault(message=f"no answer within {self.seconds:g} s")
                    break
        return [self._result(process, values.get(number, process.fault)) for number, (process, _) in enumerate(calls)]

    def close(self) -> None:
        """End the server and all of its processes."""
        if self._channel:
            self._channel.close()
        if self._server:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._channel = self._server = None

    def _result(self, process: Process, value: tuple[Any] | Fault | None) -> Any:
        """The value of a call or its fault, which ends the process if it is the first one."""
        if not isinstance(value, Fault):
            return value and value[0]
        if process.fault is None:
            process.fault = value
            process.end()
        return value

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
            return Fault(message=answer["error"], line=answer["line"]) if "error" in answer else (answer["value"],)
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
