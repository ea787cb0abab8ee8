"""Rollout servers in threads of the test: the real gateway over HTTP in front of the tiny model instead of vLLM."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import uvicorn
from os_processes import free_port
from safetensors.torch import load_file

from sdkit.batches import SamplingParams, SamplingRequest
from sdkit.models.weights import Weights
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.serving.gateway import FOLDER, KEY, Gateway

START_STOP_SECONDS = 20  # seconds that a server may take to start or stop


class TinySampler:
    """A server on `port`; `kill` drops its connections, and `start` starts a new one without the synced weights."""

    def __init__(self, model, folder, key=None, port=None):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model_folder, self.folder, self.key = model, folder, key
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.load = lambda: AutoModelForCausalLM.from_pretrained(model).eval()
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.max_tokens = 1024
        self.config = {}  # overrides of the model's config in the server's state
        self.fault = None  # called with the number of a completion; may raise, kill or return a status
        self.loads, self.requests, self.log = [], [], []
        self.start()

    def start(self):
        self.causal = self.load()
        self.lock = threading.Lock()
        gateway = Gateway(self._vllm_app, {FOLDER: str(self.folder)} | ({KEY: self.key} if self.key else {}))
        state = SimpleNamespace(engine_client=self)

        async def app(scope, receive, send):
            scope["app"] = SimpleNamespace(state=state)
            await gateway(scope, receive, send)

        self.gateway = gateway
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off")
        self.http = uvicorn.Server(config)
        self.http.install_signal_handlers = lambda: None
        self.thread = threading.Thread(target=self.http.run, daemon=True)
        self.thread.start()
        ends = time.monotonic() + START_STOP_SECONDS
        while not self.http.started:
            assert time.monotonic() < ends, "the server did not come up"
            time.sleep(0.01)

    def kill(self, wait=True):
        """Stop listening and drop connections; a completion that kills its server passes `wait=False`."""
        self.http.should_exit = self.http.force_exit = True
        if wait:
            self.thread.join(START_STOP_SECONDS)
        else:
            time.sleep(0.4)  # uvicorn checks every 0.1 s

    close = kill

    @property
    def model_config(self):
        config = self.causal.config.to_dict() | self.config
        return SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: config), dtype="torch.float32", max_model_len=self.max_tokens
        )

    async def pause_generation(self):
        self.log.append("pause")

    async def resume_generation(self):
        self.log.append("resume")

    async def reset_prefix_cache(self):
        return True

    async def collective_rpc(self, method, timeout, args):
        assert method == "sync_file"
        missing, unknown = self.causal.load_state_dict(load_file(args[0]), strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unknown
        self.loads.append(args[0])
        return [1]

    async def _vllm_app(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        status, answer = 200, {}
        if scope["path"] == "/v1/completions":
            status, answer = await asyncio.to_thread(self._complete, json.loads(body))
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def _complete(self, body):
        import torch

        ids = body["prompt"]
        if "prompt_logprobs" in body:
            with self.lock, torch.no_grad():
                logprobs = self.causal(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            places = [
                {str(token): {"logprob": place[token].item()}} for place, token in zip(logprobs, ids[1:], strict=True)
            ]
            return 200, {"choices": [{"prompt_logprobs": [None, *places]}]}
        if self.fault and (status := self.fault(len(self.requests))):
            return status, {"error": {"message": "refused by the test"}}
        self.requests.append({"prompt": tuple(ids), "seed": body.get("seed"), "weights": dict(self.gateway.loaded)})
        backend = TransformersRollouts(self.tokenizer, 1, tuple(body["stop_token_ids"]))
        backend.load(Weights(self.causal), 0)
        sampling = SamplingParams(
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            max_new_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
        )
        request = SamplingRequest(prompt_ids=tuple(ids), seed=body.get("seed", 0))
        with self.lock:
            done = backend.sample([request], sampling)[0]
        choice = {
            "token_ids": done.ids,
            "logprobs": {"token_logprobs": done.logprobs},
            "finish_reason": "stop" if done.finished else "length",
        }
        return 200, {"choices": [choice]}
