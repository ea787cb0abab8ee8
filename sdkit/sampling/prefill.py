"""The key-value cache of a batch of completions: allocated once, and filled with a prefix that all prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sdkit.models.prefix import LEAST_SAVED, Ids, common_length, run_prefix


class AllocatedLayer(DynamicLayer):
    """A layer's keys and values in memory for `room` tokens.  A decoding step copies its own tokens only."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.memory: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of all tokens so far, both [R, heads, tokens, width]."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = tuple(
                states.new_empty(*states.shape[:2], self.room, states.shape[-1])
                for states in (key_states, value_states)
            )
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        return self.keys, self.values


def allocate_cache(decoder: Any, prompts: Sequence[Ids], new: int) -> DynamicCache | None:
    """Returns a cache for prompts padded on the left and `new` tokens; None if the model caches anything but all keys.

    The first columns that hold nothing but padding and tokens of the prefix that all prompts share are filled, if that
    saves enough tokens.
    """
    cache: Any = DynamicCache(config=decoder.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    width = max(map(len, prompts))
    cache.layers = [AllocatedLayer(width + new) for _ in cache.layers]
    columns = min([width - 1, *(common_length(*pair) for pair in pairwise(prompts))])
    if (len(prompts) - 1) * columns < LEAST_SAVED:
        return cache
    ids = torch.tensor([prompts[0][:columns]], device=next(decoder.parameters()).device)
    prefix: Any = run_prefix(decoder, ids)
    padding = [width - len(prompt) for prompt in prompts]
    for target, layer in zip(cache.layers, prefix.layers, strict=True):
        target.update(_shift(layer.keys, padding), _shift(layer.values, padding))
    return cache


def _shift(states: Tensor, padding: Sequence[int]) -> Tensor:
    """Returns states [1, heads, tokens, width] for each row, moved right by its padding and cut: [R, …]."""
    tokens = states.shape[-2]
    shifted = states.new_zeros(len(padding), *states.shape[1:])
    for row, count in enumerate(padding):
        shifted[row, :, count:] = states[0, :, : max(tokens - count, 0)]
    return shifted
