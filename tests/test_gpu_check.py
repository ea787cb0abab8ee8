"""tools/gpu_check: its checks run in miniature on the CPU, and one that fails stops nothing."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.gpu_check.__main__ import CHECKS, run_check
from tools.gpu_check.figures import compare, read
from tools.gpu_check.runs import FORM_CHANGES, SOME_FORMS
from tools.gpu_check.setup import Setup, Skipped

ROOT = Path(__file__).resolve().parents[1]
NEED_A_GPU = {"out of memory", *(f"attention, flash_attention_2, {n} tokens" for n in (2048, 8192, 16384))}
LEFT_OUT = {"pages, bfloat16", "1.5B", *(f"form: {name}" for name in FORM_CHANGES if name not in SOME_FORMS)}


@pytest.fixture
def setup(tmp_path):
    return Setup(folder=tmp_path, on_cpu=True, miniature=True, name="a check")


def test_dry_run_passes_every_check(warm):
    done = warm.run(ROOT / "tests" / "support" / "gpu_check_dry_run.py", timeout=500)
    *found, counts = map(json.loads, done.stdout.splitlines())
    assert [line for line in found if line["ok"] is False] == []
    assert done.returncode == 0, done.stderr[-3000:]
    names = [name for part in CHECKS.values() for name in part]
    assert [line["check"] for line in found] == names
    skipped = {line["check"] for line in found if line["ok"] is None}
    assert skipped == NEED_A_GPU | LEFT_OUT
    assert counts == {"passed": len(names) - len(skipped), "failed": 0, "skipped": len(skipped)}


def raises(_):
    raise ValueError("no")


def exits(_):
    os._exit(3)


def hangs(_):
    time.sleep(60)


def skips(_):
    raise Skipped("not here")


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (raises, {"ok": False, "error": "ValueError: no"}),
        (exits, {"ok": False, "error": "its process ended with code 3"}),
        (hangs, {"ok": False, "error": "not done in 1 s"}),
        (skips, {"ok": None, "skipped": "not here"}),
        (lambda setup: {"name": setup.name}, {"ok": True, "name": "a check"}),
        (lambda _: {"ok": False}, {"ok": False}),
    ],
)
def test_each_check_has_its_own_process(check, expected, setup):
    found = run_check(check, setup, 1.0)
    assert found.pop("seconds") >= 0
    assert found == expected


def test_gradient_norms_are_compared_with_the_cpus():
    stored = read()["pages, float32"]
    assert compare("pages, float32", stored, "float32")["ok"]
    assert not compare("pages, float32", {name: 1.01 * norm for name, norm in stored.items()}, "float32")["ok"]
    one_other_draw = stored | {"sdft": 2 * stored["sdft"]}
    assert compare("pages, float32", one_other_draw, "float32")["ok"]


def test_every_page_has_a_stored_norm():
    pages = {path.stem for path in (ROOT / "sdkit" / "methods").glob("*.yaml")}
    assert set(read()["pages, float32"]) == set(read()["pages, bfloat16"]) == pages


def test_every_form_of_training_has_a_stored_norm():
    assert set(read()) >= {f"form: {name}" for name in FORM_CHANGES}
