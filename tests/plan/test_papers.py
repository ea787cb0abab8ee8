"""The papers' run files fit the machines that they name, by the plan."""

import re
from pathlib import Path

import pytest
from attrs import evolve

from sdkit.language.load import load_spec
from sdkit.plan.accelerators import ACCELERATORS, Machine
from sdkit.plan.machine import shape_of
from sdkit.plan.plan import make_plan
from sdkit.plan.text import NEARLY_FULL

PAPERS = sorted((Path(__file__).resolve().parents[2] / "specs" / "papers").glob("*.yaml"))
OWN = re.compile(
    r"^machine: \{ranks: 8, memory_gib: 139, accelerator: h200\} # one node of 8 × H200: (\d+) GiB a rank$", re.M
)
SMALLER = re.compile(r"^# 8 × H100 of 80 GB with training\.zero_stage=3: (\d+) GiB a rank$", re.M)


def peak(spec, path, machine):
    plan = make_plan(spec, machine, shape_of(spec, path.parent))
    assert plan.peak_gib <= NEARLY_FULL * machine.memory_gib
    return round(plan.peak_gib)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_run_file_fits_its_machines(path):
    spec, text = load_spec(path).spec, path.read_text(encoding="utf-8")
    own, smaller = OWN.search(text), SMALLER.search(text)
    assert own, "says which machine it fits"
    assert smaller, "says how it fits a smaller one"
    h200 = Machine(ranks=8, memory_gib=139, vllm="0.32.0", accelerator=ACCELERATORS["h200"])
    assert peak(spec, path, h200) == int(own[1])
    sharded = evolve(spec, training=evolve(spec.training, zero_stage=3))
    h100 = Machine(ranks=8, memory_gib=79, vllm="0.32.0", accelerator=ACCELERATORS["h100"])
    assert peak(sharded, path, h100) == int(smaller[1])
