"""A vLLM worker extension: loads new weights and repacks the output projection, which the reload leaves stale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sdkit.sampling import vllm_cpu

if not torch.cuda.is_available():
    vllm_cpu.register()  # vLLM imports this module in every worker, before it chooses kernels


class SyncExtension:
    """A mixin that vLLM adds to its worker class (`worker_extension_cls`)."""

    model_runner: Any
    reload_weights: Callable[..., None]  # the worker's

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Load Hugging Face tensors, one by one; returns the number of output projections.

        The worker's own `reload_weights` copies into the tensors that the model has, so CUDA graphs see the new values.
        The model must be complete: part of a fused group leaves garbage.  vLLM holds the tensors of a fused group until
        the group is complete.  A result of 0 means that the output projection may be stale.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

        self.reload_weights(weights_iterator=weights)
        heads = [m for m in self.model_runner.get_model().modules() if isinstance(m, ParallelLMHead)]
        for head in heads:
            # On a CPU a tied head keeps a packed copy of its own, which the reload does not refresh.
            if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
                head.quant_method.process_weights_after_loading(head)
        return len(heads)

    def sync_file(self, path: str) -> int:
        """Load the Hugging Face tensors of one safetensors file; returns the same as `sync_weights`."""
        with safe_open(path, framework="pt") as file:
            return self.sync_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
