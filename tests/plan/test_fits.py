"""What documentation and run files say about machines agrees with the plan."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdkit.language.load import load_spec
from sdkit.plan.machine import machine_for, shape_of
from sdkit.plan.plan import make_plan
from sdkit.plan.text import NEARLY_FULL

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted((ROOT / "specs" / "papers").glob("*.yaml"))
COMMENT = re.compile(
    r"^# Memory of a rank: \d+ GiB on 8 × H200; \d+ GiB on 8 × H100 of 80 GB with training.zero_stage=3.$", re.M
)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_papers_fit_the_machine_that_they_name(path):
    spec, text = load_spec(path).spec, path.read_text(encoding="utf-8")
    machine = machine_for(spec)
    plan = make_plan(spec, machine, shape_of(spec, path.parent))
    assert plan.peak_gib <= NEARLY_FULL * machine.memory_gib
    assert not any("gpu_memory_utilization" in note for note in plan.derived)
    assert COMMENT.search(text)


def test_table_and_comments_agree_with_the_plan():
    tool = ROOT / "tools" / "gpu_page.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
