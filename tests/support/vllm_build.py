"""Skips a test that runs real vLLM where there is none that runs on a CPU: the suite hides the GPUs."""

from importlib import metadata

import pytest


def require_vllm():
    """Skips the test or module unless vLLM's build for CPUs is installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    names = metadata.packages_distributions()["vllm"]
    if not any("cpu" in f"{name} {metadata.version(name)}" for name in names):
        reason = "vLLM is its GPU build: `make clean test SDKIT_DEVICE=cpu` installs the one for CPUs"
        pytest.skip(reason, allow_module_level=True)
