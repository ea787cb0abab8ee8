"""Engines that sample: what vLLM cannot do, and settings of it that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.rules.base import Context, Finding, run_rule
from sdkit.language.specs import HOTTEST_VLLM, ExperimentSpec, VllmEngine


@run_rule("vLLM takes the temperature")
def vllm_temperature(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """vLLM refuses requests above its highest temperature; transformers takes any."""
    if not isinstance(spec.rollout.backend, VllmEngine):
        return
    for path, temperature in spec.temperatures():
        if temperature > HOTTEST_VLLM:
            message = f"vLLM samples at temperatures up to {HOTTEST_VLLM:g}, not at {temperature:g}"
            yield path, message, "lower it, or use rollout.backend: transformers"
