"""The door of a rollout server: what of vLLM's HTTP API is reachable, and the two routes that sdkit adds.

vLLM puts this class in front of its application (`--middleware`).  Only the paths below pass, each but the health check
with the key, where there is one; nothing here runs what a request names.

    GET  /health            whether the server is up
    GET  /v1/models         as vLLM has it
    POST /v1/completions    as vLLM has it, where the header `sdkit-weights` names the weights that are loaded
    GET  /sdkit/state       the weights that are loaded, the model's shape, the folder of weight files, and whether the
                            file that `?probe=` names is in it
    POST /sdkit/weights     {version, file, sha256}: take the weights in that file of the folder

A weight update waits for the completions that are under way and lets none in until it is done, so every completion was
sampled by the weights that its request named.  Knows no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from attrs import frozen

from sdkit import __version__
from sdkit.language.errors import first_line

FOLDER = "SDKIT_WEIGHTS_FOLDER"
KEY = "VLLM_API_KEY"
"""Environment variables of the server's process; the second is vLLM's own, and guards its routes a second time."""

WEIGHTS_HEADER = "sdkit-weights"
"""Names the weights that a completion is asked of: the SHA-256 of their file."""

SPEC_HEADER = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
"""What two models must have in common, for one to take the other's weights; keys of `config.json`."""

DRAIN_SECONDS = 300.0
"""How long a weight update waits for completions that are under way."""
LOAD_SECONDS = 900.0
"""How long vLLM may take over a file."""
LARGEST_BODY = 4096
"""Bytes of a request to update weights."""

ALLOWED_ROUTES = {("GET", "/health"), ("GET", "/v1/models")}
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
PROBE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.probe")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RejectedRequest(Exception):
    """What a request is answered instead: a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@frozen(kw_only=True)
class Update:
    """The weights that a request wants loaded."""

    version: int
    file: Path
    sha256: str


class Gateway:
    """An ASGI application around vLLM's."""

    def __init__(self, app: App, environment: Mapping[str, str] = os.environ) -> None:
        self.app = app
        self.folder = Path(environment[FOLDER]).resolve()
        self.key = environment.get(KEY) or None
        self.loaded: dict[str, Any] | None = None  # version and sha256 of the weights
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._updating = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, answer, or refuse one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._answer(scope, receive, send)
            except RejectedRequest as refusal:
                error = {"error": {"message": str(refusal)}}
                await _reply(send, refusal.status, error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["method"], scope["path"]
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        if asked != ("GET", "/health"):
            self._admit(headers)
        if asked in ALLOWED_ROUTES:
            await self.app(scope, receive, send)
        elif asked == ("POST", "/v1/completions"):
            await self._complete(headers, scope, receive, send)
        elif asked == ("GET", "/sdkit/state"):
            await _reply(send, 200, self._state(scope))
        elif asked == ("POST", "/sdkit/weights"):
            update = self._wanted(await _body(receive))
            await _reply(send, 200, await self._update(scope["app"].state.engine_client, update))
        else:
            raise RejectedRequest(404, "this server has no such route")

    def _admit(self, headers: Mapping[str, bytes]) -> None:
        if (
            "origin" in headers
        ):  # sdkit sends none, browsers do: no page may use this machine's servers
            raise RejectedRequest(403, "requests of web pages are not answered")
        if self.key is None:
            return
        given = headers.get("authorization", b"")
        if not secrets.compare_digest(given, f"Bearer {self.key}".encode()):
            raise RejectedRequest(401, "the key is missing or wrong")

    async def _complete(
        self, headers: Mapping[str, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        wanted = headers.get(WEIGHTS_HEADER, b"").decode("latin-1")
        if self.loaded is None or self.loaded["sha256"] != wanted:
            has = f"weights {self.loaded['version']}" if self.loaded else "no weights of a run"
            raise RejectedRequest(409, f"the server has {has}, and others were asked for")
        self._under_way += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
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
            "model": {name: config.get(name) for name in SPEC_HEADER},
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_tokens": model.max_model_len,
        }

    def _wanted(self, body: bytes) -> Update:
        try:
            found = json.loads(body)
            version, name, sha256 = found["version"], found["file"], found["sha256"]
        except (ValueError, KeyError, TypeError):
            raise RejectedRequest(400, "a weight update has version, file and sha256") from None
        if not isinstance(version, int) or not isinstance(sha256, str):
            raise RejectedRequest(
                400, "a weight update has a number for version and text for sha256"
            )
        if not isinstance(name, str) or not FILE.fullmatch(name):
            raise RejectedRequest(400, "file must be the plain name of a .safetensors file")
        file = self.folder / name
        if file.is_symlink() or not file.is_file():
            raise RejectedRequest(
                400, f"there is no file {name} in the server's folder {self.folder}"
            )
        return Update(version=version, file=file, sha256=sha256)

    async def _update(self, engine: Any, update: Update) -> dict[str, Any]:
        """Load the weights while nothing is sampled; without a stamp from the first byte to the last."""
        async with self._updating:
            if await asyncio.to_thread(sha256_of, update.file) != update.sha256:
                raise RejectedRequest(422, f"{update.file.name} is damaged: its hash is another")
            self.loaded = None
            try:
                await asyncio.wait_for(self._idle.wait(), DRAIN_SECONDS)
            except TimeoutError:
                raise RejectedRequest(
                    503, f"completions are still under way after {DRAIN_SECONDS:.0f} s"
                ) from None
            started = time.monotonic()
            await engine.pause_generation()
            try:
                repacked = await engine.collective_rpc(
                    "sync_file", timeout=LOAD_SECONDS, args=(str(update.file),)
                )
                emptied = await engine.reset_prefix_cache()
            except Exception as error:
                said = first_line(error)
                raise RejectedRequest(500, f"vLLM could not take the weights: {said}") from None
            finally:
                await engine.resume_generation()
            if not all(repacked) or not emptied:
                raise RejectedRequest(500, "vLLM kept an old output projection or old prefixes")
            self.loaded = {"version": update.version, "sha256": update.sha256}
            return self.loaded | {"seconds": time.monotonic() - started}


def sha256_of(path: Path) -> str:
    """The hash that names the weights in a file.  Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _body(receive: Receive) -> bytes:
    """The whole body of a request.  Raises Refused where it is too long."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RejectedRequest(400, "the request was left")
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise RejectedRequest(413, f"a weight update has at most {LARGEST_BODY} bytes")
        if not message.get("more_body"):
            return body


async def _reply(send: Send, status: int, body: Mapping[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
