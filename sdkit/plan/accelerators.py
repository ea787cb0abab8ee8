"""Machines as data: what a plan must know of one, and public figures of some accelerators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import frozen

AcceleratorName = Literal["a100_80", "h100", "h200", "gh200"]


@frozen(kw_only=True)
class Accelerator:
    """What the maker states of one device."""

    title: str
    teraflops: float  # dense, bfloat16
    terabytes: float  # a second, from its own memory


ACCELERATORS: Mapping[AcceleratorName, Accelerator] = {
    "a100_80": Accelerator(title="A100 SXM 80 GB", teraflops=312, terabytes=2.039),
    "h100": Accelerator(title="H100 SXM", teraflops=989, terabytes=3.35),
    "h200": Accelerator(title="H200 SXM", teraflops=989, terabytes=4.8),
    "gh200": Accelerator(title="GH200 96 GB", teraflops=990, terabytes=4.0),
}
"""NVIDIA's data sheets; their figures with sparsity are twice as large, and nothing here is sparse."""


@frozen(kw_only=True)
class Machine:
    """What a plan needs to know of the machine; the command fills it in, a test writes it down."""

    ranks: int = 1
    memory_gib: float | None = None
    vllm: str | None = None  # version, where installed
    emulates_bfloat16: bool = False  # no unit of it multiplies bfloat16
    accelerator: AcceleratorName | None = None
