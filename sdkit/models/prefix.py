"""Runs the prefix that all rows of a forward pass share once, at batch size 1.

The other tokens of each row attend to the prefix's keys and values, expanded to all rows, and gradients flow back through
them.  Only for models whose states `takes_prefix` (train/row_probe.py) compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sdkit.batches import PaddedSequences

LEAST_SAVED = 256
"""Tokens that a shared prefix must save; below, a pass of its own costs as much."""
LEAST_SHARE = 0.05
"""Share of the padded tokens that it must save, since attention after a prefix needs a mask, which slower kernels take."""


class PrefixCache(DynamicCache):
    """The keys and values of a prefix, at batch size 1.  Once frozen, a pass of several rows reads them only."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.frozen = False

    @property
    def is_plain(self) -> bool:
        """Whether every layer keeps keys and values and nothing else, such as a recurrent state."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values of the prefix and of these tokens, both [R, heads, prefix + tokens, width]."""
        if key_states.shape[0] == 1 and self.frozen:  # activation checkpointing repeats the prefix's own pass
            return key_states, value_states
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        rows = key_states.shape[0]
        keys = torch.cat([layer.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([layer.values.expand(rows, -1, -1, -1), value_states], dim=-2)
        return keys, values


def prefix_pays(sequences: PaddedSequences) -> bool:
    """Whether to run the shared prefix apart."""
    saved = (sequences.input_ids.shape[0] - 1) * sequences.shared_prefix
    return saved >= max(LEAST_SAVED, LEAST_SHARE * sequences.input_ids.numel())


def states_after_prefix(decoder: Any, sequences: PaddedSequences) -> Tensor:
    """Returns the hidden states that predict the counted tokens, [M, H], from one pass for the prefix and one for the rest.

    There must be at least two rows.  Raises TypeError if the model caches more than keys and values.
    """
    ids, mask, positions = sequences.input_ids, sequences.attention_mask, sequences.positions
    start, width = sequences.shared_prefix, ids.shape[1]
    cache = PrefixCache(decoder.config)
    if not cache.is_plain:
        raise TypeError("the model caches more than keys and values")
    decoder(input_ids=ids[:1, :start], past_key_values=cache, use_cache=True)
    cache.frozen = True
    out = decoder(
        input_ids=ids[:, start:],
        attention_mask=None if mask is None else mask[:, :, start:],
        position_ids=None if positions is None else positions[:, start:],
        past_key_values=cache,
        use_cache=True,
    )
    row, column = sequences.predictor_index // width, sequences.predictor_index % width
    return out.last_hidden_state[row, column - start]
