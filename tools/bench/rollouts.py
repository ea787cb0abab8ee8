"""Compares sdkit's vLLM backend with vLLM alone: `python -m tools.bench.rollouts DTYPE` prints JSON.

One engine in one process samples the same prompts both ways, in alternation: vLLM alone with one set of parameters and
nothing read but the ids, sdkit with a seed and log-probabilities for each request.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from sdkit.batches import SamplingParams, SamplingRequest
from sdkit.language.specs import VllmBackend
from sdkit.models.loading import resolve_model
from sdkit.sampling.vllm import VllmRollouts

ROWS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 100, 64, 5


def main(dtype: str) -> None:
    """Print the median seconds of each way, and the ratio of their speeds."""
    model = str(resolve_model("bundled:smollm2-135m-instruct", Path()))
    backend = VllmRollouts(VllmBackend(), model, dtype, PROMPT_TOKENS + NEW_TOKENS, end_ids=())
    seconds: dict[str, list[float]] = {"sdkit": [], "alone": []}
    for number in range(ROUNDS + 1):
        prompts = torch.randint(100, 40_000, (ROWS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(number))
        ways = {"sdkit": lambda p=prompts: _sdkit(backend, p), "alone": lambda p=prompts: _alone(backend, p)}
        for way in ("sdkit", "alone") if number % 2 else ("alone", "sdkit"):
            backend.engine.reset_prefix_cache()
            started = time.perf_counter()
            ways[way]()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - started)
    ratios = [alone / own for own, alone in zip(seconds["sdkit"], seconds["alone"], strict=True)]
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    print(json.dumps(medians | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}))


def _sdkit(backend: VllmRollouts, prompts: torch.Tensor) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS)
    backend.sample(
        [SamplingRequest(prompt_ids=tuple(ids), seed=i) for i, ids in enumerate(prompts.tolist())], sampling
    )


def _alone(backend: VllmRollouts, prompts: torch.Tensor) -> None:
    import vllm

    params = vllm.SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    rows = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts.tolist()]
    backend.generate(rows, [params] * len(rows))


if __name__ == "__main__":
    main(sys.argv[1])
