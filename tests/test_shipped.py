"""What sdkit ships is sound: every spec is free of problems and warnings, and plans as it did when last looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdkit.language import load_spec
from sdkit.problems import render

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"


@pytest.mark.parametrize(
    "path", sorted(SPECS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(SPECS))
)
def test_a_shipped_spec_has_no_problem_and_no_warning(path):
    checked = load_spec(path)
    assert not checked.problems, render(checked.problems, checked.texts)
    assert checked.kind == ("method" if path.parent.name == "methods" else "run")


def test_no_two_run_files_share_a_name():
    names = [p.stem for folder in (SPECS, SPECS / "papers") for p in folder.glob("*.yaml")]
    assert len(names) == len(set(names))


def test_plans_are_the_frozen_ones():
    tool = ROOT / "tools" / "freeze_plans.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
