"""What vLLM's engines are started with, on a CPU and on a simulated GPU, and when the engine of this process sleeps."""

import ast
import importlib.util
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve, fields
from tinyruns import make_spec, rollout, train, training

from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput
from sdkit.language.rules.engines import REASONS
from sdkit.language.specs import RolloutSpec, Table, VllmBackend, VllmEngine, VllmServerBackend
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan
from sdkit.plan.text import render_plan
from sdkit.sampling.vllm_settings import check_engine_args, engine_settings, is_eager
from sdkit.train import loop
from sdkit.train.rollout_backends import RolloutBackends

BACKEND = ("rollout", "backend")


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch report a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_graphs_are_captured_on_a_gpu_unless_the_spec_says_eager(gpu):
    settings = engine_settings(VllmBackend(), "bfloat16", 100)
    assert settings["enforce_eager"] is False
    assert settings["gpu_memory_utilization"] == 0.4
    assert not {"kv_cache_memory_bytes", "block_size", "ir_op_priority"} & settings.keys()
    assert engine_settings(VllmBackend(enforce_eager=True), "bfloat16", 100)["enforce_eager"] is True


def test_nothing_is_compiled_on_a_cpu_unless_the_spec_says_so(cpu):
    assert engine_settings(VllmBackend(), "float32", 100)["enforce_eager"] is True
    assert engine_settings(VllmBackend(), "float32", 100)["ir_op_priority"]["rms_norm"][-1] == "native"
    compiled = VllmBackend(enforce_eager=False)
    assert not is_eager(compiled)
    assert "ir_op_priority" not in engine_settings(compiled, "float32", 100)  # its compiler fuses torch's operations


def test_whole_prompts_fit_one_step_of_the_engine(cpu):
    assert engine_settings(VllmBackend(), "float32", 100)["max_num_batched_tokens"] == 4096
    assert engine_settings(VllmBackend(), "float32", 5000)["max_num_batched_tokens"] == 5000
    small = VllmBackend(max_num_batched_tokens=512)
    assert engine_settings(small, "float32", 512)["max_num_batched_tokens"] == 512
    with pytest.raises(BadData, match="512, but the longest sequence has 513 tokens") as caught:
        engine_settings(small, "float32", 513)
    assert caught.value.path == (*BACKEND, "max_num_batched_tokens")


def test_chunked_prefill_needs_a_gpu(cpu, monkeypatch):
    chunked = VllmBackend(enable_chunked_prefill=True, max_num_batched_tokens=512)
    with pytest.raises(BadEnvironment, match="request with a seed") as caught:
        engine_settings(chunked, "float32", 100)
    assert caught.value.path == (*BACKEND, "enable_chunked_prefill")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = engine_settings(chunked, "float32", 5000)
    assert (settings["enable_chunked_prefill"], settings["max_num_batched_tokens"]) == (True, 512)


def test_named_settings_and_engine_arguments_reach_vllm(cpu):
    plain = engine_settings(VllmServerBackend(), "bfloat16", 100)
    named = {"tensor_parallel_size": 2, "quantization": "fp8_per_tensor", "kv_cache_dtype": "fp8"}
    others = {"enable_prefix_caching": False, "max_cudagraph_capture_size": 64}
    spec = VllmServerBackend(**named, engine_args=Table(others))
    assert engine_settings(spec, "bfloat16", 100) == plain | named | others


def test_engine_arguments_that_vllm_does_not_have_are_refused(monkeypatch):
    known = SimpleNamespace(EngineArgs=make_dataclass("EngineArgs", ["enable_prefix_caching"]))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", known)
    check_engine_args(VllmBackend(engine_args=Table({"enable_prefix_caching": False})))
    with pytest.raises(BadData, match="no engine argument 'enable_prefix_cache'") as caught:
        check_engine_args(VllmBackend(engine_args=Table({"enable_prefix_cache": False})))
    assert caught.value.hint == 'did you mean "enable_prefix_caching"?'
    assert caught.value.path == (*BACKEND, "engine_args", "enable_prefix_cache")


def test_names_are_those_of_the_installed_vllm():
    installed = importlib.util.find_spec("vllm")
    if installed is None:
        pytest.skip("vLLM is not installed")
    source = Path(installed.submodule_search_locations[0], "engine/arg_utils.py").read_text(encoding="utf-8")
    (body,) = [n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "EngineArgs"]
    known = {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    of_sdkit = {"canary_bound", "engine_args", "kv_cache_gib"}
    of_a_server = {"host", "port", "uds", "api_key", "middleware"}
    assert {f.name for f in fields(VllmEngine)} - of_sdkit <= known
    assert "enable_sleep_mode" in known
    assert REASONS.keys() - of_a_server <= known


def planned(ranks, backend):
    spec = make_spec("folder", training=training(prompts_per_step=6))
    spec = evolve(spec, rollout=RolloutSpec(backend=backend))
    return render_plan(spec, make_plan(spec, Machine(ranks=ranks), None))


def test_plan_prints_the_engine():
    assert "  engine: up to 64 sequences at once, CUDA graphs on a GPU\n" in planned(1, VllmServerBackend())
    everything = VllmBackend(
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        enable_chunked_prefill=True,
        enforce_eager=True,
        tensor_parallel_size=2,
        quantization="mxfp8",
        kv_cache_dtype="fp8",
        engine_args=Table({"attention_backend": "FLASHINFER"}),
        enable_sleep_mode=True,
    )
    expected = (
        "  engine: up to 8 sequences at once, up to 2048 tokens a step, chunked prefill, eager, each shared by 2 GPUs, "
        "mxfp8 weights, fp8 cache, attention_backend FLASHINFER, asleep during training\n"
    )
    assert expected in planned(6, everything)


def test_ranks_divide_into_groups_that_share_an_engine():
    with pytest.raises(UnreadableInput, match="tensor_parallel_size is 4, but there are 6 ranks"):
        planned(6, VllmBackend(tensor_parallel_size=4))
    assert "shared by 4 GPUs" in planned(1, VllmServerBackend(tensor_parallel_size=4))


def test_engine_sleeps_from_sampling_to_the_end_of_training(tiny_folder, tmp_path, monkeypatch):
    events = []
    for owner, name in ((RolloutBackends, "sleep"), (RolloutBackends, "load"), (loop, "train_step")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function, n=name, **k: (events.append(n), f(*a, **k))[1])
    train(make_spec(tiny_folder, training=training(steps=2), rollout=rollout(max_new_tokens=4)), tmp_path / "run")
    assert events == ["load", "sleep", "train_step"] * 2
