"""The program that hosts a user's environment: it imports the file once, and forks a process for each trajectory.

    python worker.py FILE CLASS ARGUMENTS_AS_JSON FOLDERS_AS_JSON

Standard input is a Unix socket.  Each message on it brings a socket of one trajectory's own, and is answered with the number
of the process that serves it.  On that socket each line is a request {"call": name, "arguments": …}, answered by a line
{"value": …} or {"error": …, "line": …}.  Every process ends when its socket closes.  Only the standard library is imported
here: no trainer's state can be reached from a user's file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import sys
import traceback
from typing import Any


def main(path: str, name: str, arguments: dict[str, Any], folders: list[str]) -> None:
    """Answer with {"value": null} once the file is loaded, or with its error; then fork for each message."""
    end_with_parent()
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the user's code prints
    try:
        found = getattr(_load(path, folders), name)
        if prepare := getattr(found, "_prepare", None):  # of sdkit's own classes
            prepare(**arguments)
    except BaseException as error:
        channel.sendall(_line(_failure(error, path)))
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    channel.sendall(_line({"value": None}))
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            os.setsid()
            end_with_parent()
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve(socket.socket(fileno=descriptors[0]), found, arguments, path)
            os._exit(0)
        os.close(descriptors[0])
        channel.sendall(_line({"value": pid}))


def end_with_parent() -> None:
    """Make the kernel kill this process once its parent has ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _load(path: str, folders: list[str]) -> Any:
    sys.path[:] = list(dict.fromkeys([*sys.path, *folders]))
    spec = importlib.util.spec_from_file_location("environment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["environment"] = module
    spec.loader.exec_module(module)
    return module


def _serve(connection: socket.socket, found: Any, arguments: dict[str, Any], path: str) -> None:
    """Serve one trajectory: an instance of its own, made by the first request."""
    instance: Any = None
    with connection, connection.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            try:
                if request["call"] == "open":
                    _seed(request["seed"])
                    instance = found(**arguments)
                    value = instance.reset(**request["arguments"])
                else:
                    value = _call(instance, request["call"], request["arguments"])
                answer = _line({"value": value})
            except BaseException as error:
                answer = _line(_failure(error, path))
            connection.sendall(answer)


def _call(instance: Any, name: str, arguments: dict[str, Any]) -> Any:
    """Call a method; one that the class may leave out gives None."""
    optional = name in ("get_reward", "close")
    return None if optional and not hasattr(instance, name) else getattr(instance, name)(**arguments)


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _failure(error: BaseException, path: str) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return {"error": f"{type(error).__name__}: {error}", "line": lines[-1] if lines else None}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
