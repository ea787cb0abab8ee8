"""Sampling with transformers' `generate` on the training weights.  Knows only token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.models.logit_transform import decoder
from sdkit.models.weights import Weights
from sdkit.sampling.few_rows import few_rows_are_columns
from sdkit.sampling.prefill import allocate_cache
from sdkit.stdout import Advance, no_progress

DUMMY_REQUEST = SamplingRequest(prompt_ids=(0,), seed=0)
"""Keeps a rank in step with the others once it has no prompts left."""


class TransformersRollouts:
    """A rollout backend that calls `generate` on the weights loaded last.  `load` copies nothing."""

    name = "transformers"

    def __init__(self, tokenizer: Any, batch_size: int, end_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.end_ids = end_ids
        self.weights: Weights | None = None

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        self.weights = weights
        return {}

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance = no_progress
    ) -> list[Completion]:
        assert self.weights is not None, "sample before load"
        # Similar lengths share a batch: less padding, and a row's result depends less on its neighbors.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        done: dict[int, Completion] = {}
        with self.weights.active() as model:
            was_training = model.training
            model.eval()
            batches = len(range(0, len(order), self.batch_size))
            for number in range(self.weights.sharding.all_reduce_max(batches)):
                chosen = order[number * self.batch_size :][: self.batch_size]
                if not chosen:  # parameters are sharded, and another rank still has prompts
                    brief = evolve(sampling, max_new_tokens=1)
                    self.weights.sharding.run_forward(self._generate, model, [DUMMY_REQUEST], brief, no_progress)
                    continue
                rows = [requests[i] for i in chosen]
                longest = evolve(sampling, max_new_tokens=max(_limit(request, sampling) for request in rows))
                batch = self.weights.sharding.run_forward(self._generate, model, rows, longest, advance)
                done.update(zip(chosen, batch, strict=True))
            model.train(was_training)
        return [done[i] for i in range(len(requests))]

    def _generate(
        self, model: Any, requests: list[SamplingRequest], sampling: SamplingParams, advance: Advance
    ) -> list[Completion]:
        width = max(len(r.prompt_ids) for r in requests)
        pad = self.end_ids[0]
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        device = next(model.parameters()).device
        sampler = SeededSampler(requests, sampling, advance)
        prompts = [r.prompt_ids for r in requests]
        takes_prefix = self.weights is not None and self.weights.takes_prefix
        cache = allocate_cache(decoder(model), prompts, sampling.max_new_tokens) if takes_prefix else None
        with few_rows_are_columns(model), own_settings(model, self._settings(sampling)) as settings:
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                generation_config=settings,
                logits_processor=[sampler],
                tokenizer=self.tokenizer if sampling.stop else None,
                synced_gpus=self.weights is not None and self.weights.sharding.in_step,
            )
        advance(len(requests) * (1 - len(sampler.logprobs) / sampling.max_new_tokens))  # they ended early
        rows, logprobs = out[:, width:].tolist(), torch.stack(sampler.logprobs, dim=1).tolist()
        return [
            self._completion(row[: _limit(request, sampling)], own, sampling.stop)
            for request, row, own in zip(requests, rows, logprobs, strict=True)
        ]

    def _settings(self, sampling: SamplingParams) -> dict[str, Any]:
        """Returns greedy settings: `SeededSampler` draws the tokens, `generate` only decides when to stop."""
        return {
            "do_sample": False,
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": list(self.end_ids),
            "pad_token_id": self.end_ids[0],
            "stop_strings": list(sampling.stop) or None,
        }

    def _completion(self, row: list[int], logprobs: list[float], stop: tuple[str, ...]) -> Completion:
        end = next((i + 1 for i, token in enumerate(row) if token in self.end_ids), None)
        # `generate` pads a row that a stop string ended with an end token that was not sampled: check the string first.
        cut = self._stop_length(row[:end], stop)
        ids = row[: cut or end]
        return Completion(ids=tuple(ids), logprobs=tuple(logprobs[: len(ids)]), finished=bool(cut or end))

    def _stop_length(self, row: list[int], stop: tuple[str, ...]) -> int | None:
        """Returns the number of tokens up to and including the one that completes a stop string; None without one."""
        lengths = range(1, len(row) + 1) if stop else ()
        texts = ((n, self.tokenizer.decode(row[:n])) for n in lengths)
        return next((n for n, text in texts if any(word in text for word in stop)), None)

    def close(self) -> None:
        self.weights = None


def _limit(request: SamplingRequest, sampling: SamplingParams) -> int:
    """Tokens that a request may sample."""
    return sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


@contextlib.contextmanager
def own_settings(model: Any, settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a `GenerationConfig` with these settings, the only one that `model.generate` uses inside the block.

    `generate` fills every field that is None from `model.generation_config`, but None is also how a field is disabled.
    The checkpoint's settings (a repetition penalty, suppressed tokens, beams) would then change what is sampled.
    """
    from transformers import GenerationConfig

    checkpoint_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(**settings)
    finally:
        model.generation_config = checkpoint_config


class SeededSampler:
    """A logits processor that draws each row's token from its own random generator and records its log-probability.

    It returns logits whose arg max is the drawn token, so greedy `generate` picks it.  Sampling therefore does not use
    the global generator, and the log-probabilities are exact under temperature, top_k and top_p.
    """

    def __init__(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance = no_progress
    ) -> None:
        self.sampling = sampling
        self.advance = advance  # receives each token's share of its completions
        self.generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.logprobs: list[Tensor] = []  # of the drawn tokens, [rows] for each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        if self.sampling.ids_below is not None:
            ids = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(ids >= self.sampling.ids_below, float("-inf"))
        if self.sampling.temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
            logprobs = logits.log_softmax(-1)
        else:
            heated = logits if self.sampling.temperature == 1 else logits / self.sampling.temperature
            logprobs = self._truncated(heated).log_softmax(-1)
            draws = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
            cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
            target = draws.to(cumulative.device)[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        self.advance(len(chosen) / self.sampling.max_new_tokens)
        return torch.full_like(logits, float("-inf")).scatter(-1, chosen, 0.0)

    def _truncated(self, logits: Tensor) -> Tensor:
        if self.sampling.top_k:
            kth = logits.topk(min(self.sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.sampling.top_p < 1:
            ordered, ids = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(-1)
            outside = probabilities.cumsum(-1) - probabilities >= self.sampling.top_p
            dropped = outside.scatter(-1, ids, outside)  # back in vocabulary order
            logits = logits.masked_fill(dropped, float("-inf"))
        return logits
