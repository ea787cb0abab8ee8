"""What runs inside vLLM's worker: take new weights and repack what the reload leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor


class SyncExtension:
    """Mixed into the worker class by `worker_extension_cls`."""

    model_runner: Any

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Load Hugging Face tensors (whole models only: part of a fused group leaves rubbish).

        They are taken one by one as they come; those of a fused group are held until it is complete.

        Returns the number of output projections repacked; 0 means that the head may be stale.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=weights)
        heads = [
            m for m in self.model_runner.get_model().modules() if isinstance(m, ParallelLMHead)
        ]
        for head in heads:
            # A tied head keeps a packed copy of its own, which the reload does not refresh.
            head.quant_method.process_weights_after_loading(head)
        return len(heads)

    def sync_file(self, path: str) -> int:
        """Load the Hugging Face tensors of one safetensors file; returns what `sync_weights` does."""
        with safe_open(path, framework="pt") as file:
            return self.sync_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
