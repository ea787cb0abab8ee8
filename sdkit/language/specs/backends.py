"""Backends: the software that samples, and its settings."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    GIBIBYTES,
    INSIDE_SHARE,
    NAME,
    NOT_EMPTY,
    OPTION,
    POSITIVE,
    SECONDS,
    TEXT_END,
    Range,
    Table,
    spec_field,
)

HOTTEST_VLLM = 2.0
"""The highest temperature that vLLM accepts."""
Quantization = Literal[
    "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "int8_per_channel_weight_only", "nvfp4_per_token"
]
"""The formats to which vLLM itself converts weights; others need a checkpoint that is quantized already."""
ENGINE_ARGUMENT = Range(
    "the name of an engine argument of vLLM, such as enable_prefix_caching",
    lambda v: bool(re.fullmatch("[a-z][a-z0-9_]{0,99}", v)),
    {"pattern": f"^[a-z][a-z0-9_]{{0,99}}{TEXT_END}"},
)


@frozen(kw_only=True)
class AutoBackend:
    """vLLM if it is installed, otherwise transformers; `sdkit plan` says which and why."""

    kind: ClassVar[str] = "auto"


@frozen(kw_only=True)
class TransformersBackend:
    """transformers' `generate` on the training weights."""

    kind: ClassVar[str] = "transformers"
    batch_size: int = spec_field("rows generated at once", default=64, range=AT_LEAST_ONE)


@frozen(kw_only=True)
class VllmEngine:
    """The settings of a vLLM engine, in the trainer's process or in a server."""

    dtype: Literal["float32", "bfloat16"] | None = spec_field(
        "precision of the engine (default: the model's)", default=None
    )
    max_num_seqs: int = spec_field("sequences decoded at once", default=64, range=AT_LEAST_ONE)
    max_num_batched_tokens: int | None = spec_field(
        "most tokens that one step of the engine computes; without chunked prefill at least the longest sequence "
        "(default: 4096, or the longest sequence if it is longer)",
        default=None,
        range=AT_LEAST_ONE,
    )
    enable_chunked_prefill: bool = spec_field(
        "split long prompts over several steps of the engine; on a GPU only, because on a CPU vLLM cannot split a prompt "
        "whose request has a seed",
        default=False,
    )
    enforce_eager: bool | None = spec_field(
        "run the model as it is written, without compiling it and without CUDA graphs (default: on a CPU only)",
        default=None,
    )
    tensor_parallel_size: int = spec_field(
        "GPUs that share one engine; in the trainer's process, neighbouring ranks share it and sample each other's prompts",
        default=1,
        range=AT_LEAST_ONE,
    )
    quantization: Quantization | None = spec_field(
        "number format to which the engine converts the linear layers of each new version of the weights (default: none); "
        "rollouts then come from slightly other weights",
        default=None,
    )
    kv_cache_dtype: Literal["bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = spec_field(
        "number format of the key-value cache (default: the engine's precision)", default=None
    )
    kv_cache_gib: float = spec_field("key-value cache on CPU, GiB", default=1.0, range=GIBIBYTES)
    gpu_memory_utilization: float = spec_field("share of GPU memory for the engine", default=0.4, range=INSIDE_SHARE)
    canary_bound: float | None = spec_field(
        "largest mean difference of log-probabilities after a weight sync (default: 1e-3 in float32, 0.02 in float32 on a "
        "GPU with TF32, 0.25 otherwise)",
        default=None,
        range=POSITIVE,
    )
    engine_args: Table[str | int | float | bool] = spec_field(
        "further engine arguments under vLLM's own names, such as `enable_prefix_caching: false`",
        default=Table(),
        each=OPTION,
        names=ENGINE_ARGUMENT,
    )

    @property
    def is_exact(self) -> bool:
        """Whether the engine computes with the weights as they are sent."""
        return self.quantization is None and self.kv_cache_dtype is None

    def describe(self) -> str:
        """Returns the engine's settings in words."""
        form = {None: "CUDA graphs on a GPU", True: "eager", False: "compiled, CUDA graphs on a GPU"}
        budget, shared = self.max_num_batched_tokens, self.tensor_parallel_size
        parts = (
            f"up to {self.max_num_seqs} sequences at once",
            budget and f"up to {budget} tokens a step",
            self.enable_chunked_prefill and "chunked prefill",
            form[self.enforce_eager],
            shared > 1 and f"each shared by {shared} GPUs",
            self.quantization and f"{self.quantization} weights",
            self.kv_cache_dtype and f"{self.kv_cache_dtype} cache",
            *(f"{name} {value}" for name, value in self.engine_args.items()),
        )
        return ", ".join(part for part in parts if part)


@frozen(kw_only=True)
class VllmBackend(VllmEngine):
    """vLLM in the trainer's process."""

    kind: ClassVar[str] = "vllm"
    enable_sleep_mode: bool = spec_field(
        "free the engine's GPU memory during training; it gets the weights again before it samples (no effect on a CPU)",
        default=False,
    )

    def describe(self) -> str:
        """Returns the engine's settings in words."""
        return super().describe() + (", asleep during training" if self.enable_sleep_mode else "")


@frozen(kw_only=True)
class VllmServerBackend(VllmEngine):
    """One or more vLLM servers, here or on other machines; `sdkit serve` starts one that matches the spec.

    Weights are passed as files in a folder that the trainer and all servers can read.
    """

    kind: ClassVar[str] = "vllm_server"
    urls: tuple[str, ...] = spec_field(
        "addresses of the servers; groups are distributed among them",
        default=("http://127.0.0.1:8000",),
        range=NOT_EMPTY,
        each=NAME,
    )
    key_from: str | None = spec_field(
        "environment variable with the servers' API key; the key itself is never in a spec", default=None, range=NAME
    )
    allow_remote: bool = spec_field(
        "allow servers on other machines, which receive prompts and weights", default=False
    )
    folder: str | None = spec_field(
        "folder for the weight files, relative to the spec (default: weights/ in sdkit's cache folder, for servers on "
        "this machine)",
        default=None,
        path_to="file",
    )
    deadline_seconds: float = spec_field(
        "longest time for one completion or one weight transfer, retries included; a single server may be unreachable "
        "for this long",
        default=600.0,
        range=SECONDS,
    )


@frozen(kw_only=True)
class ReplayBackend:
    """Replays the recorded rollouts of an earlier run, without sampling."""

    kind: ClassVar[str] = "replay"
    run: str = spec_field("run directory, relative to the spec", path_to="file")


Backend = AutoBackend | TransformersBackend | VllmBackend | VllmServerBackend | ReplayBackend
