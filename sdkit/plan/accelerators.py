"""Machines as data: the facts that a plan uses, and published figures of some accelerators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import frozen

AcceleratorName = Literal["a100_80", "h100", "h200", "gh200"]


@frozen(kw_only=True)
class Accelerator:
    """Figures of one device: published or measured rates, and the assumed fractions of them that a step reaches."""

    title: str
    teraflops: float  # dense, in `dtype`
    terabytes: float  # per second, memory bandwidth
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute_utilization: float = 0.4  # in passes over full sequences
    bandwidth_utilization: float = 0.6  # in decoding


ACCELERATORS: Mapping[AcceleratorName, Accelerator] = {
    "a100_80": Accelerator(title="A100 SXM 80 GB", teraflops=312, terabytes=2.039),
    "h100": Accelerator(title="H100 SXM", teraflops=989, terabytes=3.35),
    "h200": Accelerator(title="H200 SXM", teraflops=989, terabytes=4.8),
    "gh200": Accelerator(title="GH200 96 GB", teraflops=990, terabytes=4.0),
}
"""From NVIDIA's data sheets, without sparsity (which would double the operations)."""


@frozen(kw_only=True)
class Machine:
    """The facts about a machine that a plan uses.  Commands detect them, tests set them."""

    ranks: int = 1
    memory_gib: float | None = None
    vllm: str | None = None  # version, if installed
    emulates_bfloat16: bool = False  # no hardware support for bfloat16
    on_cpu: bool = False  # no accelerator: the models are in the host's memory
    accelerator: Accelerator | None = None
