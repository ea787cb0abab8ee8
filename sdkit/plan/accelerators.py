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
    cuda_names: tuple[str, ...] = ()  # what CUDA calls the device
    teraflops: float  # dense, in `dtype`
    terabytes: float  # per second, memory bandwidth
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute_utilization: float = 0.4  # in passes over full sequences
    bandwidth_utilization: float = 0.6  # in decoding


ACCELERATORS: Mapping[AcceleratorName, Accelerator] = {
    "a100_80": Accelerator(
        title="A100 SXM 80 GB", cuda_names=("NVIDIA A100-SXM4-80GB",), teraflops=312, terabytes=2.039
    ),
    "h100": Accelerator(title="H100 SXM", cuda_names=("NVIDIA H100 80GB HBM3",), teraflops=989, terabytes=3.35),
    "h200": Accelerator(title="H200 SXM", cuda_names=("NVIDIA H200",), teraflops=989, terabytes=4.8),
    "gh200": Accelerator(title="GH200 96 GB", cuda_names=("NVIDIA GH200 480GB",), teraflops=990, terabytes=4.0),
}
"""From NVIDIA's data sheets, without sparsity (which would double the operations)."""


def accelerator_named(name: str) -> Accelerator | None:
    """Returns the accelerator that CUDA calls `name`; None if its figures are not known.

    Variants of a device, such as PCIe cards and MIG slices, have other names and other figures.
    """
    return next((one for one in ACCELERATORS.values() if name in one.cuda_names), None)


@frozen(kw_only=True)
class Machine:
    """The facts about a machine that a plan uses.  Commands detect them, tests set them."""

    ranks: int = 1
    memory_gib: float | None = None
    vllm: str | None = None  # version, if installed
    emulates_bfloat16: bool = False  # no hardware support for bfloat16
    on_cpu: bool = False  # no accelerator: the models are in the host's memory
    accelerator: Accelerator | None = None
