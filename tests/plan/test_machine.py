"""Detection of the machine's properties for a plan."""

from pathlib import Path

import pytest

from sdkit.language.load import load_spec
from sdkit.plan import machine
from sdkit.plan.accelerators import Machine
from sdkit.plan.machine import emulates_bfloat16
from sdkit.plan.plan import make_plan

DEMO = Path(__file__).resolve().parents[2] / "specs" / "sdft.yaml"


@pytest.mark.parametrize(
    ("flags", "emulated"), [("fpu sse avx2", True), ("avx512f avx512_bf16", False), ("bf16", False)]
)
def test_processor_flags_tell_if_bfloat16_is_emulated(tmp_path, flags, emulated):
    (tmp_path / "cpuinfo").write_text(f"model name: x\nflags\t: {flags}\n")
    assert emulates_bfloat16(tmp_path / "cpuinfo") is emulated


def test_bfloat16_is_not_emulated_if_flags_are_unknown(tmp_path):
    assert not emulates_bfloat16(tmp_path / "missing")


@pytest.mark.parametrize(
    ("dtype", "emulates", "expected"), [("bfloat16", True, 1), ("float32", True, 0), ("bfloat16", False, 0)]
)
def test_plan_warns_of_emulated_bfloat16(dtype, emulates, expected):
    spec = load_spec(DEMO, [f"model.dtype={dtype}"]).spec
    plan = make_plan(spec, Machine(emulates_bfloat16=emulates), None)
    assert sum("emulated" in line for line in plan.derived) == expected


@pytest.mark.parametrize(("attention", "expected"), [("flash_attention_2", 1), ("sdpa", 0)])
def test_plan_says_that_flash_attention_shares_no_rows(attention, expected):
    overrides = ["model.dtype=bfloat16", f"model.attn_implementation={attention}", "rollout.completions_per_prompt=4"]
    plan = make_plan(load_spec(DEMO, overrides).spec, Machine(), None)
    assert sum("takes no mask for shared rows" in line for line in plan.derived) == expected


@pytest.mark.parametrize(("printed", "gib"), [("81920\\n40960\\n", 40.0), ("[N/A]\\n", None)])
def test_memory_is_that_of_the_smallest_gpu(printed, gib, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert machine.memory_gib() == gib


def test_memory_of_a_gpu_is_unknown_without_its_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert machine.memory_gib() is None
