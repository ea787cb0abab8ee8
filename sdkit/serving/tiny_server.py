"""Stand-ins for servers, on loopback: a tiny model behind the routes that a served teacher needs, and a scripted writer.

For smoke runs and tests.  The client and its requests are the real ones.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

CONTEXT = 8192  # tokens of the longest request
MAX_LOGPROBS = 512


class LoopbackServer(ThreadingHTTPServer):
    """A server on a free port of this machine.  A client that disconnects early is not an error."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class JsonServer:
    """Answers requests with JSON from a thread, at `url`, until it is closed.

    `reply` returns status and body of the response to a path and a body, {} for a GET; it may be replaced.
    """

    def __init__(self, reply: Callable[[str, Any], tuple[int, Any]]) -> None:
        self.reply = reply
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*outer.reply(self.path, {}))

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                self._send(*outer.reply(self.path, json.loads(self.rfile.read(length))))

            def _send(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._http = LoopbackServer(Handler)
        self.url = self._http.url
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class TinyServer(JsonServer):
    """Serves the model in `folder` under `name`."""

    def __init__(self, folder: Path, name: str, max_logprobs: int = MAX_LOGPROBS) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = name
        self.max_logprobs = max_logprobs
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._one_at_a_time = threading.Lock()
        super().__init__(self.answer)

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Returns status and body of a response, as vLLM would."""
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": self.name, "max_model_len": CONTEXT, "root": self.name}]}
            case "/detokenize":
                return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
            case "/v1/completions" if body["prompt_logprobs"] > self.max_logprobs:
                message = (
                    f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
                )
                return 400, {"error": {"message": message + str(self.max_logprobs)}}
            case "/v1/completions":
                logprobs = self._prompt_logprobs(body["prompt"], body["prompt_logprobs"])
                return 200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": logprobs}]}
            case _:
                return 404, {"error": {"message": "Not Found"}}

    @torch.no_grad()
    def _prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        with self._one_at_a_time:
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for row, token in zip(logprobs, ids[1:], strict=True):
            chosen = [token, *row.topk(k).indices.tolist()]
            entries.append({str(i): {"logprob": max(row[i].item(), -9999.0)} for i in chosen})
        return entries


class ScriptedWriter(JsonServer):
    """Answers each chat under `name` with what `script` returns for its messages; keeps them."""

    def __init__(self, name: str, script: Callable[[Sequence[Mapping[str, str]]], str]) -> None:
        self.name = name
        self.script = script
        self.chats: list[Sequence[Mapping[str, str]]] = []
        super().__init__(self.answer)

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Returns status and body of a response."""
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name}]}
        self.chats.append(body["messages"])
        return 200, {"choices": [{"message": {"role": "assistant", "content": self.script(body["messages"])}}]}
