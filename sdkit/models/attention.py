"""Attention on a CPU: does not repeat grouped keys under a mask, and has a faster gradient for short rows in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SHORT, NARROW = 192, 64
"""Tokens of a row and width of a head up to which torch's gradient kernel takes longer in bfloat16 than in float32."""


def cpu_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Returns what transformers' `sdpa` attention returns: [rows, tokens, heads, width] and no attention weights.

    query [rows, heads, tokens, width]; key, value [rows, groups, cached tokens, width]
    """
    attend = partial(_attend, module, attention_mask, kwargs)
    if _has_slow_gradient(query, key, attention_mask, kwargs):
        return _Float32Gradient.apply(attend, query, key, value), None  # pyright: ignore[reportReturnType]
    return attend(query, key, value), None


def install() -> None:
    """Makes `cpu_sdpa` the `sdpa` attention of all models in this process.  On other devices it is transformers' own."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", cpu_sdpa)


def _attend(
    module: Any, mask: Tensor | None, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Transformers' attention, except that keys of a group are not repeated.

    Under a mask transformers copies the keys and values of a group to each of its heads, because CUDA's kernels require
    that; at every decoded token this takes longer than the attention.  CPU kernels read them in place.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    repeats = mask is not None and query.shape[1] != key.shape[1]
    if not repeats or not _is_plain(kwargs) or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    states = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=True,
    )
    return states.transpose(1, 2).contiguous()


def _has_slow_gradient(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether torch's gradient kernel is the slow one, and float32 can replace it: no dropout, no mask of numbers."""
    trained = torch.is_grad_enabled() and query.requires_grad
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    short = key.shape[2] <= SHORT and key.shape[3] <= NARROW
    same = not kwargs.get("dropout") and _is_plain(kwargs)
    return trained and slow and short and same and (mask is None or mask.dtype == torch.bool)


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether the layer asks for nothing that `scaled_dot_product_attention` does not have."""
    return kwargs.get("position_bias") is None and kwargs.get("cache") is None


class _Float32Gradient(torch.autograd.Function):
    """Attention with bfloat16's values and the gradient of float32, for which the scores are computed again."""

    @staticmethod
    def forward(ctx: Any, attend: Attend, *states: Tensor) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(*states)
        return attend(*states)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: once_differentiable's type
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        states = [saved.float().requires_grad_() for saved in ctx.saved_tensors]
        with torch.enable_grad():
            result = ctx.attend(*states)
        gradients = torch.autograd.grad(result, states, gradient.float())
        return None, *(g.to(gradient.dtype) for g in gradients)
