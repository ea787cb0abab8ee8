"""The gateway of a rollout server: an allow-list of vLLM's HTTP routes, and two routes that sdkit adds.

vLLM puts this class in front of its application (`--middleware`).  Only the routes below are reachable.  If the server
has a key, every route but the health check requires it.  No route runs code that a request names.

    GET  /health            whether the server is up
    GET  /v1/models         vLLM's route
    POST /v1/completions    vLLM's route, if the header `sdkit-weights` names the loaded weights
    GET  /sdkit/state       the loaded weights, the model's shape, the folder of weight files, and whether it contains
                            the file that `?probe=` names
    POST /sdkit/weights     {version, file, sha256}: load the weights in that file of the folder

A weight update waits for the completions in flight and holds back new ones until it is done.  Every completion is
therefore sampled by the weights that its request named.  Knows no torch.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from sdkit import __version__
from sdkit.language.errors import first_line
from sdkit.language.files import sha256_of

FOLDER = "SDKIT_WEIGHTS_FOLDER"
KEY = "VLLM_API_KEY"
"""Environment variables of the server process.  The second is vLLM's own, so vLLM checks the key as well."""

WEIGHTS_HEADER = "sdkit-weights"
"""The request header that names the weights to sample with: the SHA-256 of their file."""

COMPARED_CONFIG_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
"""Keys of `config.json` that must agree for one model to load the other's weights."""

DRAIN_SECONDS = 300.0
"""How long a weight update waits for completions in flight."""
LOAD_SECONDS = 900.0
"""How long vLLM may take to load a file."""
LARGEST_BODY = 4096
"""Largest body of a weight update, in bytes."""

ALLOWED_ROUTES = {("GET", "/health"), ("GET", "/v1/models")}
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
PROBE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.probe")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RejectedRequest(Exception):
    """A request that the gateway refuses, with an HTTP status and one line of text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """An ASGI application that wraps vLLM's."""

    def __init__(self, app: App, environment: Mapping[str, str] = os.environ) -> None:
        self.app = app
        self.folder = Path(environment[FOLDER]).resolve()
        self.key = environment.get(KEY) or None
        self.loaded: dict[str, Any] | None = None  # version and sha256 of the weights
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._updating = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward, answer or reject one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._answer(scope, receive, send)
            except RejectedRequest as rejection:
                error = {"error": {"message": str(rejection)}}
                await _reply(send, rejection.status, error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["method"], scope["path"]
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        if route != ("GET", "/health"):
            self._authorize(headers)
        if route in ALLOWED_ROUTES:
            await self.app(scope, receive, send)
        elif route == ("POST", "/v1/completions"):
            await self._complete(headers, scope, receive, send)
        elif route == ("GET", "/sdkit/state"):
            await _reply(send, 200, self._state(scope))
        elif route == ("POST", "/sdkit/weights"):
            version, file, sha256 = self._parse_update(await _body(receive))
            engine = scope["app"].state.engine_client
            await _reply(send, 200, await self._update(engine, version, file, sha256))
        else:
            raise RejectedRequest(404, "this server has no such route")

    def _authorize(self, headers: Mapping[str, bytes]) -> None:
        # Browsers send this header, sdkit does not: no web page may use this machine's servers.
        if "origin" in headers:
            raise RejectedRequest(403, "requests from web pages are not answered")
        if self.key is None:
            return
        given = headers.get("authorization", b"")
        if not secrets.compare_digest(given, f"Bearer {self.key}".encode()):
            raise RejectedRequest(401, "the key is missing or wrong")

    async def _complete(self, headers: Mapping[str, bytes], scope: Scope, receive: Receive, send: Send) -> None:
        wanted = headers.get(WEIGHTS_HEADER, b"").decode("latin-1")
        if self.loaded is None or self.loaded["sha256"] != wanted:
            loaded = f"weights {self.loaded['version']}" if self.loaded else "no weights of a run"
            raise RejectedRequest(409, f"the server has {loaded}, but the request names others")
        self._in_flight += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _state(self, scope: Scope) -> dict[str, Any]:
        model = scope["app"].state.engine_client.model_config
        probe = parse_qs(scope["query_string"].decode("latin-1")).get("probe", [""])[0]
        config = model.hf_config.to_dict()
        return {
            "sdkit": __version__,
            "weights": self.loaded,
            "folder": str(self.folder),
            "sees_probe": bool(PROBE.fullmatch(probe)) and (self.folder / probe).is_file(),
            "model": {name: config.get(name) for name in COMPARED_CONFIG_KEYS},
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_tokens": model.max_model_len,
        }

    def _parse_update(self, body: bytes) -> tuple[int, Path, str]:
        """Returns the version, the file and its SHA-256 that a request names."""
        try:
            update = json.loads(body)
            version, name, sha256 = update["version"], update["file"], update["sha256"]
        except (ValueError, KeyError, TypeError):
            raise RejectedRequest(400, "a weight update has version, file and sha256") from None
        if not isinstance(version, int) or not isinstance(sha256, str):
            raise RejectedRequest(400, "a weight update has a number for version and text for sha256")
        if not isinstance(name, str) or not FILE.fullmatch(name):
            raise RejectedRequest(400, "file must be the plain name of a .safetensors file")
        file = self.folder / name
        if file.is_symlink() or not file.is_file():
            raise RejectedRequest(400, f"there is no file {name} in the server's folder {self.folder}")
        return version, file, sha256

    async def _update(self, engine: Any, version: int, file: Path, sha256: str) -> dict[str, Any]:
        """Load the weights while nothing is sampled; `loaded` is None until all of them are loaded."""
        async with self._updating:
            if await asyncio.to_thread(sha256_of, file) != sha256:
                raise RejectedRequest(422, f"{file.name} is damaged: its SHA-256 does not match")
            self.loaded = None
            try:
                await asyncio.wait_for(self._idle.wait(), DRAIN_SECONDS)
            except TimeoutError:
                raise RejectedRequest(503, f"completions are still under way after {DRAIN_SECONDS:.0f} s") from None
            started = time.monotonic()
            await engine.pause_generation()
            try:
                repacked = await engine.collective_rpc("sync_file", timeout=LOAD_SECONDS, args=(str(file),))
                is_reset = await engine.reset_prefix_cache()
            except Exception as error:
                message = f"vLLM could not load the weights: {first_line(error)}"
                raise RejectedRequest(500, message) from None
            finally:
                await engine.resume_generation()
            if not all(repacked) or not is_reset:
                raise RejectedRequest(500, "vLLM kept an old output projection or old prefixes")
            self.loaded = {"version": version, "sha256": sha256}
            return self.loaded | {"seconds": time.monotonic() - started}


async def _body(receive: Receive) -> bytes:
    """Returns the body of a request.  Raises RejectedRequest if it is too long."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RejectedRequest(400, "the client disconnected")
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise RejectedRequest(413, f"a weight update has at most {LARGEST_BODY} bytes")
        if not message.get("more_body"):
            return body


async def _reply(send: Send, status: int, body: Mapping[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
