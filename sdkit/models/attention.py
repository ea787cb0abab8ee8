"""Masked attention on CPU that does not repeat grouped keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Returns what transformers' `sdpa` attention returns: [rows, tokens, heads, width] and no attention weights.

    Under a mask transformers copies the keys and values of a group to each of its heads, because CUDA's kernels require
    that; at every decoded token this takes longer than the attention.  CPU kernels read them in place.
    query [rows, heads, tokens, width]; key, value [rows, groups, cached tokens, width]
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    repeats = attention_mask is not None and query.shape[1] != key.shape[1]
    known = kwargs.get("position_bias") is None and kwargs.get("cache") is None
    if not repeats or not known or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    states = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=True,
    )
    return states.transpose(1, 2).contiguous(), None


def install() -> None:
    """Makes `grouped_sdpa` the `sdpa` attention of all models in this process."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", grouped_sdpa)
