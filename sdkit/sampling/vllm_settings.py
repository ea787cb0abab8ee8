"""Settings of vLLM's engines and of its requests, in this process and on servers.  Imports vLLM only to check names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sdkit.batches import SamplingParams
from sdkit.language.errors import BadData, BadEnvironment, did_you_mean, shorten
from sdkit.language.specs import VllmEngine
from sdkit.sampling import vllm_cpu

EXTENSION = "sdkit.sampling.vllm_worker.SyncExtension"
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "min_tokens": 0}
"""Settings that vLLM may have other defaults for.  They are sent with every request: only the spec decides how to sample."""
BATCHED_TOKENS = 4096
"""Tokens that one step of the engine computes, unless a sequence is longer or the spec says otherwise."""
MOST_BIASED_IDS = 1024
"""MAX_NUM_LOGIT_BIAS_TOKENS of vLLM's GPU runner, which takes as many `allowed_token_ids`."""
FORBIDDING_BIAS = -1e9
"""What is added to the logits of ids that must not be sampled.  vLLM's HTTP API raises it to -100, enough for its
temperatures, which end at 2."""


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


def is_eager(spec: VllmEngine) -> bool:
    """Whether the engine neither compiles the model nor captures CUDA graphs; by default on a CPU only."""
    return not torch.cuda.is_available() if spec.enforce_eager is None else spec.enforce_eager


def engine_settings(spec: VllmEngine, dtype: str, max_tokens: int) -> dict[str, Any]:
    """Returns vLLM's engine arguments, for this process or a server.

    `max_tokens` is the length of the longest sequence.  Raises BadData or BadEnvironment for settings that this machine
    or these sequences exclude.
    """
    settings: dict[str, Any] = {
        "dtype": spec.dtype or dtype,
        "max_model_len": max_tokens,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens or max(BATCHED_TOKENS, max_tokens),
        # Per-request seeds break on a CPU if a prompt's prefill is split, so the budget fits whole prompts.
        "enable_chunked_prefill": spec.enable_chunked_prefill,
        "enforce_eager": is_eager(spec),
        "use_tqdm_on_load": False,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        # The default, "auto", fills in missing request settings from the checkpoint's generation_config.json.
        "generation_config": "vllm",
    }
    if spec.tensor_parallel_size > 1:
        settings["tensor_parallel_size"] = spec.tensor_parallel_size
    if spec.quantization:
        settings["quantization"] = spec.quantization
    if spec.kv_cache_dtype:
        settings["kv_cache_dtype"] = spec.kv_cache_dtype
    _check_prefill(spec, max_tokens)
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = spec.gpu_memory_utilization
    else:
        # Prompts share only whole cache blocks; the CPU default of 128 tokens is longer than most prompts.
        settings |= {"kv_cache_memory_bytes": int(spec.kv_cache_gib * 2**30), "block_size": 32}
        if is_eager(spec):
            settings["ir_op_priority"] = vllm_cpu.PRIORITY
    return settings | dict(spec.engine_args)


def _check_prefill(spec: VllmEngine, max_tokens: int) -> None:
    """Raise BadEnvironment for chunked prefill on a CPU, BadData if a step of the engine is too short for a sequence."""
    backend = ("rollout", "backend")
    if spec.enable_chunked_prefill:
        if not torch.cuda.is_available():
            raise BadEnvironment(
                "on a CPU vLLM cannot split the prefill of a request with a seed",
                hint="remove enable_chunked_prefill",
                path=(*backend, "enable_chunked_prefill"),
            )
    elif spec.max_num_batched_tokens and spec.max_num_batched_tokens < max_tokens:
        raise BadData(
            f"max_num_batched_tokens is {spec.max_num_batched_tokens}, but the longest sequence has {max_tokens} tokens, "
            "and its prefill is one step of the engine",
            hint=f"use {max_tokens} or more, or on a GPU enable_chunked_prefill: true",
            path=(*backend, "max_num_batched_tokens"),
        )


def check_engine_args(spec: VllmEngine) -> None:
    """Raise BadData if the spec's `engine_args` has a name that the installed vLLM has no engine argument for.

    Without arguments it does nothing, because the import of vLLM takes seconds.
    """
    if not spec.engine_args:
        return
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs) if not field.name.startswith("_")]
    for name in spec.engine_args:
        if name not in known:
            raise BadData(
                f"vLLM has no engine argument {shorten(name)}",
                hint=did_you_mean(name, known),
                path=("rollout", "backend", "engine_args", name),
            )
