"""Runs a prefix that rows of a forward pass share once, at batch size 1.

The other tokens of each row attend to the prefix's keys and values, expanded to all those rows, and gradients flow back
through them.  Only for models whose states `takes_prefix` (train/row_probe.py) compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sdkit.batches import PaddedSequences, PrefixGroup

LEAST_SAVED = 256
"""Padded tokens that another pass must save; below, the pass costs as much."""
LEAST_SHARE = 0.05
"""Share of the padded tokens that a prefix must save, since attention after it needs a mask, which slower kernels take."""

Ids = tuple[int, ...]


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


def group_by_prefix(prompts: Sequence[Ids], widths: Sequence[int]) -> tuple[PrefixGroup, ...]:
    """Returns the rows of a pass in groups of consecutive rows, such that few padded tokens are computed.

    prompts, widths: of each row, its first tokens and its number of tokens.  The last token of a prompt is in no prefix,
    since it predicts the first one after it.
    """
    shared = [common_length(*pair) for pair in pairwise(prompts)]

    def split(start: int, end: int) -> tuple[PrefixGroup, ...]:
        one = _group(start, end, prompts, widths, shared)
        inside = shared[start : end - 1]
        if not inside or min(inside) == max(inside):
            return (one,)
        cuts = [start + i + 1 for i, tokens in enumerate(inside) if tokens == min(inside)]
        parts = [part for a, b in pairwise([start, *cuts, end]) for part in split(a, b)]
        saved = _padded_tokens(one) - sum(_padded_tokens(part) for part in parts)
        return tuple(parts) if saved >= LEAST_SAVED * (len(parts) - 1) else (one,)

    return split(0, len(prompts))


def _group(start: int, end: int, prompts: Sequence[Ids], widths: Sequence[int], shared: Sequence[int]) -> PrefixGroup:
    """Returns the group of rows `start` to `end`, with a prefix if it pays."""
    width = max(widths[start:end])
    prefix = min([*shared[start : end - 1], *(len(prompt) - 1 for prompt in prompts[start:end])])
    saved = (end - start - 1) * prefix
    pays = saved >= max(LEAST_SAVED, LEAST_SHARE * (end - start) * width)
    return PrefixGroup(start=start, end=end, prefix=prefix if pays else 0, width=width)


def _padded_tokens(group: PrefixGroup) -> int:
    return group.prefix + (group.end - group.start) * (group.width - group.prefix)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns the number of tokens, or of characters of texts, that both start with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def states_by_group(decoder: Any, sequences: PaddedSequences) -> Tensor:
    """Returns the hidden states that predict the counted tokens, [M, H], with each group's prefix computed once.

    Raises TypeError if the model caches more than keys and values.
    """
    width = sequences.input_ids.shape[1]
    states = [
        pad(_group_states(decoder, sequences, group), (0, 0, group.prefix, width - group.width))
        for group in sequences.prefix_groups
    ]
    return torch.cat(states).flatten(0, 1)[sequences.predictor_index]


def _group_states(decoder: Any, sequences: PaddedSequences, group: PrefixGroup) -> Tensor:
    """Returns the hidden states of a group's rows after its prefix, [rows, width - prefix, H]."""
    rows, after = slice(group.start, group.end), slice(group.prefix, group.width)
    ids, mask, positions = sequences.input_ids, sequences.attention_mask, sequences.positions
    cache = run_prefix(decoder, ids[group.start : group.start + 1, : group.prefix]) if group.prefix else None
    return decoder(
        input_ids=ids[rows, after],
        attention_mask=None if mask is None else mask[rows, :, after, : group.width],
        position_ids=None if positions is None else positions[rows, after],
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def run_prefix(decoder: Any, ids: Tensor) -> PrefixCache:
    """Returns the keys and values of a prefix.  ids [1, prefix].  Raises TypeError if the model caches anything else."""
    cache = PrefixCache(decoder.config)
    if not cache.is_plain:
        raise TypeError("the model caches more than keys and values")
    decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.frozen = True
    return cache
