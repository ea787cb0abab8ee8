"""Normalization on a CPU by vLLM's compiled kernels, which vLLM leaves to torch there.

vLLM expects its graph compiler to fuse the ten torch operations of an RMSNorm.  sdkit's engines on a CPU compile
nothing, so they ask for vLLM's own kernel by the name that `register` gives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROVIDER = "sdkit_cpu"
PRIORITY = {"rms_norm": [PROVIDER, "native"], "fused_add_rms_norm": [PROVIDER, "native"]}
"""Value of vLLM's engine argument `ir_op_priority`."""


def register() -> None:
    """Make vLLM's CPU kernels available under `PROVIDER`.  Call it once in a process, before the worker is created."""
    from vllm import ir

    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_has_kernel)(_rms_norm)
    add = ir.ops.fused_add_rms_norm
    add.register_impl(PROVIDER, supports_args=_has_kernel_with_residual, inplace=True)(_fused_add_rms_norm)


# The signatures are those of vLLM's own implementations: vLLM compares them.
def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)  # in place
    return x, x_residual


def _has_kernel(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    fits = variance_size is None and weight is not None and weight.dtype == x.dtype
    return fits and x.is_contiguous()


def _has_kernel_with_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _has_kernel(x, weight, epsilon, variance_size) and x_residual.is_contiguous()
