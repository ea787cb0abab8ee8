"""Engines that sample: what vLLM cannot do, and arguments that would break sdkit's use of it."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from sdkit.language.errors import shorten
from sdkit.language.rules.base import Context, Finding, method_rule, run_rule, terms
from sdkit.language.specs import (
    HOTTEST_VLLM,
    Distillation,
    ExperimentSpec,
    MethodSpec,
    PolicyGradient,
    StudentSamples,
    VllmBackend,
    VllmEngine,
    VllmServerBackend,
)

OTHER_MODEL = "the engine serves the student, as `model` describes it"
PLACED = "sdkit starts the engines: one for each rank or server, or for tensor_parallel_size of them"
SAMPLES = "only the spec decides how to sample"
LOADED = "sdkit loads the weights of each step through an extension of vLLM's worker"
DRAFTED = "a token must depend on its prompt, its seed and the weights alone"
LISTENS = "`sdkit serve` chooses the address and puts its gateway in front"
REASONS = {
    **dict.fromkeys(("model", "model_weights", "tokenizer", "tokenizer_mode", "tokenizer_revision"), OTHER_MODEL),
    **dict.fromkeys(("revision", "code_revision", "hf_config_path", "hf_overrides", "served_model_name"), OTHER_MODEL),
    **dict.fromkeys(("runner", "convert", "load_format", "config_format"), OTHER_MODEL),
    "trust_remote_code": "sdkit runs no code of a checkpoint",
    "skip_tokenizer_init": "the texts of rollout.stop need the tokenizer",
    "max_model_len": "it is the length of the run's longest sequence",
    **dict.fromkeys(("distributed_executor_backend", "pipeline_parallel_size", "data_parallel_size"), PLACED),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port", "device_ids"), PLACED),
    "seed": "every request has its own seed",
    "logprobs_mode": "training needs the log-probabilities of the distribution that was sampled from",
    **dict.fromkeys(("generation_config", "override_generation_config", "logits_processors"), SAMPLES),
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "weight_transfer_config"), LOADED),
    "enable_lora": "adapters are merged into the weights that the engine gets",
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), DRAFTED),
    **dict.fromkeys(("host", "port", "uds", "api_key", "middleware"), LISTENS),
    "kv_cache_memory_bytes": "its key is rollout.backend.kv_cache_gib",
}
"""Engine arguments that would break a run, each with the reason."""


@run_rule("vLLM takes the temperature")
def vllm_temperature(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """vLLM refuses requests above its highest temperature; transformers takes any."""
    if not isinstance(spec.rollout.backend, VllmEngine):
        return
    for path, temperature in spec.temperatures():
        if temperature > HOTTEST_VLLM:
            message = f"vLLM samples at temperatures up to {HOTTEST_VLLM:g}, not at {temperature:g}"
            yield path, message, "lower it, or use rollout.backend: transformers"


@method_rule("engine arguments leave sdkit its own")
def engine_argument(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Some arguments have keys of their own, and some would change what is sampled, how weights arrive, or who can
    connect.
    """
    backend = spec.rollout.backend
    if not isinstance(backend, VllmEngine):
        return
    named = {field.name for kind in (VllmBackend, VllmServerBackend) for field in attrs.fields(kind)}
    for name in backend.engine_args:
        path = ("rollout", "backend", "engine_args", name)
        if name in named:
            yield path, f"{name} is a key of its own", f"write rollout.backend.{name}"
        elif reason := REASONS.get(name):
            yield path, f"{shorten(name)} cannot be set: {reason}", None


@method_rule("rollouts of a quantized engine are corrected for", "warning")
def quantized_rollouts(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A quantized engine samples from slightly other probabilities than those that are trained.  The ratio to the
    sampler corrects for this.
    """
    backend = spec.rollout.backend
    if not isinstance(backend, VllmEngine) or not isinstance(spec.rollout.sampled_by, StudentSamples):
        return
    key = "quantization" if backend.quantization else "kv_cache_dtype"
    for path, term in terms(spec, Distillation, PolicyGradient):
        if not backend.is_exact and not term.importance.sampler:
            message = f"no ratio to the sampler corrects term {shorten(path[-1])} for the quantized engine"
            hint = f"add {'.'.join(map(str, path))}.importance.sampler: {{cap: 2, level: token}}"
            yield ("rollout", "backend", key), message, hint
