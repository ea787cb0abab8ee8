"""Checks of GPUs: driver, torch's build, NCCL, precision.  Imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.cuda import nccl

from sdkit.devices import cpu_requested
from sdkit.doctor.findings import Finding
from sdkit.plan import machine
from sdkit.plan.accelerators import accelerator_named

DRIVER = Path("/proc/driver/nvidia/version")


def check_devices() -> Iterator[Finding]:
    """Yields the findings about GPUs, or about the processor if none is used."""
    if torch.cuda.is_available():
        yield Finding(check="driver", found=driver_version() or "of unknown version")
        for index in range(torch.cuda.device_count()):
            yield _check_gpu(index)
        yield _check_nccl()
        return
    yield _why_no_gpu()
    if machine.emulates_bfloat16():
        found = "no instructions for bfloat16, which is emulated: float32 is several times faster"
        yield Finding(check="processor", state="note", found=found, advice="set model.dtype: float32")
    yield Finding(check="collectives", found="gloo, for several ranks on processors")


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver; None if there is none, or if it is unknown."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and found.group(1)


def _why_no_gpu() -> Finding:
    build = f"torch {torch.__version__}"
    if cpu_requested():
        return Finding(check="device", found="the processor: SDKIT_DEVICE is cpu")
    if not any(Path(file).exists() for file in machine.GPU_FILES):
        return Finding(check="device", found=f"the processor: there is no driver of a GPU ({build})")
    if torch.version.cuda is None and torch.version.hip is None:
        found = f"a GPU's driver, but {build} is a build for CPUs"
        advice = "install a torch build for GPUs (https://pytorch.org), or set SDKIT_DEVICE=cpu"
        return Finding(check="device", state="problem", found=found, advice=advice)
    found = f"a GPU's driver ({driver_version() or 'of unknown version'}), but {build} finds no GPU"
    advice = "`nvidia-smi` and CUDA_VISIBLE_DEVICES show which GPUs there are; a torch build for a newer CUDA needs a newer driver"
    return Finding(check="device", state="problem", found=found, advice=advice)


def _check_gpu(index: int) -> Finding:
    name, check = torch.cuda.get_device_name(index), f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding(check=check, state="problem", found=f"{name} does not answer: {error}")
    rate = "" if accelerator_named(name) else "; its peak rate is not known, so runs report no time/mfu"
    found = f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free{rate}"
    if torch.cuda.get_device_capability(index) < (8, 0):
        advice = "set model.dtype: float32: GPUs before Ampere (compute capability 8.0) emulate bfloat16"
        return Finding(check=check, state="note", found=found, advice=advice)
    if free < 0.9 * total:
        return Finding(check=check, state="note", found=found, advice="`nvidia-smi` shows which processes use it")
    return Finding(check=check, found=found)


def _check_nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        found = "this build of torch has no NCCL, which several ranks need"
        return Finding(
            check="collectives", state="problem", found=found, advice="install a torch build for GPUs on Linux"
        )
    return Finding(check="collectives", found=f"NCCL {'.'.join(map(str, nccl.version()))}")
