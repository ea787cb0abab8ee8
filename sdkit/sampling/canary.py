"""The canary: a fixed sequence on whose log-probabilities trainer and engine must agree after a weight transfer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from attrs import frozen

from sdkit.batches import PaddedSequences
from sdkit.language.errors import NumericsGuard
from sdkit.language.specs import VllmEngine
from sdkit.losses.chunks import scored_logprobs
from sdkit.models.device import rank_device
from sdkit.models.weights import Weights
from sdkit.seeds import derive

LONGEST = 64  # tokens
FLOAT32_BOUND = 1e-3
TF32_BOUND = 0.02
"""Measured on the bundled model: 1.3e-3 with TF32 in attention alone, 4.7e-3 with TF32 in every product."""
BFLOAT16_BOUND = 0.25


@frozen(kw_only=True)
class Canary:
    """The sequence, and the largest difference allowed."""

    ids: tuple[int, ...]
    bound: float  # on the mean absolute difference

    @torch.no_grad()
    def logprobs(self, weights: Weights) -> tuple[float, ...]:
        """Returns the log-probabilities of all tokens but the first, as the losses compute them.

        Collective if the weights are sharded.
        """
        ids = torch.tensor([self.ids], device=weights.sharding.device_of(weights.head))
        predicted = torch.arange(len(self.ids) - 1, device=ids.device)
        sequences = PaddedSequences(
            input_ids=ids,
            attention_mask=None,
            positions=None,
            tokens=len(self.ids),
            prefix_groups=(),
            predictor_index=predicted,
            texts=(),
        )
        scores = weights.scores(sequences)
        return tuple(scored_logprobs(scores, ids[0, 1:], 1.0, len(self.ids)).tolist())

    def compare(
        self, trainer: Sequence[float], engine: Sequence[float], version: int, engine_name: str
    ) -> dict[str, float]:
        """Returns mean and largest difference.  Raises NumericsGuard if the mean exceeds the bound or is not a number."""
        differences = [abs(a - b) for a, b in zip(trainer, engine, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= self.bound:
            raise NumericsGuard(
                f"after loading weights {version} the log-probabilities of {engine_name} differ from the trainer's by "
                f"{mean:.3g} on average, more than the bound {self.bound:.3g}",
                hint="rollouts would come from different weights; try rollout.backend: transformers",
            )
        return {"canary_mean": mean, "canary_max": max(differences)}


def draw_canary(spec: VllmEngine, dtype: str, vocabulary: int, max_tokens: int) -> Canary:
    """Returns the canary for a model in `dtype` with `vocabulary` ids and sequences of at most `max_tokens`."""
    draw = random.Random(derive(0, "canary"))
    ids = tuple(draw.randrange(vocabulary) for _ in range(min(LONGEST, max_tokens - 1)))
    return Canary(ids=ids, bound=spec.canary_bound or default_bound(spec, dtype))


def default_bound(spec: VllmEngine, trainer_dtype: str) -> float:
    """Returns the bound for the coarsest precision in which trainer or engine compute."""
    if not spec.is_exact or {spec.dtype or trainer_dtype, trainer_dtype} != {"float32"}:
        return BFLOAT16_BOUND
    # vLLM's attention kernel for float32 uses TF32 wherever the GPU has it, whatever torch's settings are.
    device = rank_device()
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return TF32_BOUND if has_tf32 else FLOAT32_BOUND
