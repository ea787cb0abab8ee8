"""The program that hosts a user's environment: it imports the file once, and forks a process for each trajectory.

    python worker.py FILE CODE_AS_JSON FOLDERS_AS_JSON

The code is {"class": name, "arguments": …}, or {"functions": names} for plain functions (no names: every public one).
Standard input is a Unix socket.  The first line on it answers with the schemas of the tools.  Then each message brings a
socket of one trajectory's own, and is answered with the number of the process that serves it.  On that socket each line is a
request {"call": name, "arguments": …}, for a tool with "tool": true, answered by a line {"value": …} or {"error": …, "line":
…, "misfit": …}.  Every process ends when its socket closes.  Only the standard library is imported here, and transformers for the schemas
of tools: no trainer's state can be reached from a user's file.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import random
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable
from functools import partial
from typing import Any

OWN = ("reset", "reply", "get_reward", "close")
"""Methods of an environment, which are no tools."""
OURS = (__file__, json.__file__, json.encoder.__file__)
"""Files in which an error is raised if a call does not fit the user's code: other arguments, or a value that is no JSON."""


def main(path: str, code: dict[str, Any], folders: list[str]) -> None:
    """Answer with the tools once the file is loaded, or with its error; then fork for each message."""
    end_with_parent()
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the user's code prints
    try:
        make, tools = _made_of(_load(path, folders), code)
        schemas = _schemas(tools)
    except BaseException as error:
        channel.sendall(_line(_failure(error, path)))
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    channel.sendall(_line({"value": schemas}))
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
            _serve(socket.socket(fileno=descriptors[0]), make, path)
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


def _made_of(module: Any, code: dict[str, Any]) -> tuple[Callable[[], Any], list[Any]]:
    """What makes the environment of a trajectory, and its tools: functions, or methods of the class."""
    if "class" in code:
        kind = getattr(module, code["class"])
        if prepare := getattr(kind, "_prepare", None):  # of sdkit's own classes
            prepare(**code["arguments"])
        methods = inspect.getmembers(kind, inspect.isfunction)
        public = [method for name, method in methods if not (name.startswith("_") or name in OWN)]
        return partial(kind, **code["arguments"]), [] if hasattr(kind, "reply") else public
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = code["functions"] or [n for n in own if not n.startswith("_") and inspect.isfunction(getattr(module, n))]
    functions = {name: getattr(module, name) for name in names}
    return partial(types.SimpleNamespace, **functions), list(functions.values())


def _schemas(tools: list[Any]) -> list[dict[str, Any]]:
    """The tools as chat templates take them.  Raises what transformers raises for one without docstring or types."""
    if not tools:
        return []
    from transformers.utils import chat_template_utils

    # torch would be imported for the name of one type
    chat_template_utils.is_torch_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]
    return [chat_template_utils.get_json_schema(tool) for tool in tools]


def _serve(connection: socket.socket, make: Callable[[], Any], path: str) -> None:
    """Serve one trajectory: an environment of its own, made by the first request."""
    instance: Any = None
    with connection, connection.makefile("r", encoding="utf-8") as requests, asyncio.Runner() as runner:
        for line in requests:
            request = json.loads(line)
            try:
                if request["call"] == "open":
                    _seed(request["seed"])
                    instance = make()
                    value = _reset(instance, request["arguments"], request["seed"])
                else:
                    value = _call(instance, request["call"], request["arguments"])
                if inspect.iscoroutine(value):
                    value = runner.run(value)
                answer = _line({"value": str(value) if request.get("tool") else value})
            except BaseException as error:
                answer = _line(_failure(error, path))
            connection.sendall(answer)


def _reset(instance: Any, arguments: dict[str, Any], seed: int) -> Any:
    """Begin a trajectory; plain functions have nothing to begin.  A parameter `seed` gets the seed."""
    if isinstance(instance, types.SimpleNamespace):
        return None
    if "seed" in inspect.signature(instance.reset).parameters:
        arguments = {"seed": seed, **arguments}
    return instance.reset(**arguments)


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
    misfit = all(frame.filename in OURS for frame in frames)
    return {"error": f"{type(error).__name__}: {error}", "line": lines[-1] if lines else None, "misfit": misfit}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
