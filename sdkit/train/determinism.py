"""`training.deterministic`: CUDA kernels that give the same bits in every run.  On a CPU they do anyway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""Read by cuBLAS, and by transformers for flash_attention_2."""


def prepare(deterministic: bool) -> None:
    """Set the environment variables; call before the first CUDA kernel.  The user's own values stay."""
    if deterministic:
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Inside the block, torch uses deterministic kernels, and raises RuntimeError where an operation has none.

    Not for sampling: vLLM's sampler uses operations that have none.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
