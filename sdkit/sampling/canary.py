"""The canary: a fixed sequence whose log-probabilities trainer and engine must agree on after a transfer of weights."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from attrs import frozen

from sdkit.batches import PaddedSequences
from sdkit.language.errors import NumericsGuard
from sdkit.language.specs import VllmEngine
from sdkit.losses.chunks import scored_logprobs
from sdkit.models.weights import Weights
from sdkit.seeds import derive

LONGEST = 64  # tokens


@frozen(kw_only=True)
class Canary:
    """The sequence, and how far apart both sides may be."""

    ids: tuple[int, ...]
    bound: float  # of the mean difference

    @torch.no_grad()
    def told_by(self, weights: Weights) -> tuple[float, ...]:
        """The log-probabilities, as the losses compute them, of all tokens but the first.

        Collective where weights are sharded.
        """
        ids = torch.tensor([self.ids], device=weights.head.device)
        predicted = torch.arange(len(self.ids) - 1, device=ids.device)
        sequences = PaddedSequences(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            positions=None,
            tokens=len(self.ids),
            predictor_index=predicted,
            texts=(),
        )
        scores = weights.scores(sequences)
        return tuple(scored_logprobs(scores, ids[0, 1:], 1.0, len(self.ids)).tolist())

    def compare(
        self, here: Sequence[float], there: Sequence[float], version: int, who: str
    ) -> dict[str, float]:
        """Mean and largest difference.  Raises NumericsGuard where the mean is above the bound, or no number."""
        apart = [abs(a - b) for a, b in zip(here, there, strict=True)]
        mean = sum(apart) / len(apart)
        if not mean <= self.bound:
            raise NumericsGuard(
                f"after loading weights {version} the log-probabilities of {who} differ from the trainer's by "
                f"{mean:.3g} on average, more than the bound {self.bound:.3g}",
                hint="the rollouts would come from other weights; try rollout.backend: transformers",
            )
        return {"canary_mean": mean, "canary_max": max(apart)}


def draw_canary(spec: VllmEngine, dtype: str, vocabulary: int, max_tokens: int) -> Canary:
    """The canary of a model with so many ids in `dtype`, and sequences of at most `max_tokens`."""
    draw = random.Random(derive(0, "canary"))
    ids = tuple(draw.randrange(vocabulary) for _ in range(min(LONGEST, max_tokens - 1)))
    exact = "float32" == (spec.dtype or dtype) == dtype
    return Canary(ids=ids, bound=spec.canary_bound or (1e-3 if exact else 0.25))
