"""The operations of a model's forward passes over sequences (the formula: sdkit/plan/operations.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sdkit.batches import UnpaddedSequence
from sdkit.language.specs import ShapeSpec
from sdkit.models.quantization import quant_state
from sdkit.models.weights import Weights
from sdkit.plan.operations import forward_operations

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Configuration keys of a mixture of experts."""
_SHAPES: WeakKeyDictionary[nn.Module, ShapeSpec | None] = WeakKeyDictionary()
"""By model: its shape, which takes a walk over all parameters."""
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")


def pass_operations(weights: Weights, texts: Sequence[UnpaddedSequence]) -> float:
    """Returns the operations of one forward pass; nan if `model_shape` is None.

    A prompt that several texts share counts once, however the pass computes it.
    """
    if weights.causal not in _SHAPES:
        _SHAPES[weights.causal] = model_shape(weights)
    if (shape := _SHAPES[weights.causal]) is None:
        return math.nan
    prompts = sum(forward_operations(shape, len(p), len(p), 0) for p in {text.prompt for text in texts})
    completions = sum(
        forward_operations(
            shape, len(text.completion), 2 * len(text.prompt) + len(text.completion), len(text.positions)
        )
        for text in texts
    )
    return prompts + completions


def model_shape(weights: Weights) -> ShapeSpec | None:
    """Returns the shape of the loaded model; None for a mixture of experts, or if its configuration states no sizes.

    Its parameters are those that every token passes: without adapters, and without embeddings of their own.  Works on
    sharded parameters.
    """
    config = weights.causal.config.get_text_config()
    if any(getattr(config, key, None) for key in EXPERT_COUNTS) or not all(hasattr(config, key) for key in SIZES):
        return None
    head, embeddings = weights.head, weights.causal.get_input_embeddings().weight
    parameters = {id(p): _size(p) for name, p in weights.causal.named_parameters() if ".lora_" not in name}
    total = sum(parameters.values()) - (0 if embeddings is head else _size(embeddings))
    return ShapeSpec(parameters=total, **{key: getattr(config, key) for key in SIZES})


def _size(parameter: Any) -> int:
    if (state := quant_state(parameter)) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
