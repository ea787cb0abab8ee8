"""A run that was killed, wherever that was, and taken up again is the run that nobody killed: bit by bit, on one rank."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_scenario import FORMS, PHASES, STEPS, TEACHERS
from tinyruns import metrics, same, weights_of

SCENARIO = Path(__file__).with_name("kill_scenario.py")
BETWEEN = {"evaluation": 3, "save": 4, "manifest": 4, "naming": 4}
"""Phases that are not in every step, and a step after which they come."""


def case(weights, form, phase, stage=0, at=3):
    return f"{weights}-{form}-{stage}-{phase}-{BETWEEN.get(phase, at)}"


def pairs():
    """Every teacher in every phase, once with all weights and once with adapters in turn."""
    forms = list(FORMS)
    for (i, phase), (j, weights) in itertools.product(enumerate(PHASES), enumerate(TEACHERS)):
        yield case(weights, forms[(i + j) % len(forms)], phase)


def matrix():
    """Every teacher, form, phase and stage; and a kill at every boundary between steps."""
    for weights, form, stage in itertools.product(TEACHERS, FORMS, (0, 1, 2, 3)):
        for phase in PHASES:
            yield case(weights, form, phase, stage)
        for at in range(2, STEPS):
            yield case(weights, form, "boundary", stage, at)


def run_all(folder, work, cases):
    done = subprocess.run(
        [sys.executable, SCENARIO, folder, work, *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work


def assert_same_run(folder, straight):
    assert metrics(folder) == metrics(straight)
    trained = weights_of(straight)
    for name, value in weights_of(folder).items():
        same(value, trained[name])
    for kept in ("rollouts", "samples", "evaluations"):
        texts = [{p.name: p.read_text() for p in (f / kept).iterdir()} for f in (folder, straight)]
        assert texts[0] == texts[1]
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left == [f"step_{STEPS - 2:06d}"]


@pytest.fixture(scope="module")
def work(tiny_folder, tmp_path_factory):
    return run_all(tiny_folder, tmp_path_factory.mktemp("killed"), pairs())


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", list(pairs()))
def test_a_killed_run_is_taken_up_as_it_was(work, name):
    assert_same_run(work / name, work / name.rsplit("-", 2)[0])


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run_all(tiny_folder, tmp_path_factory.mktemp("matrix"), dict.fromkeys(matrix()))


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", list(dict.fromkeys(matrix())))
def test_the_whole_matrix(whole, name):
    assert_same_run(whole / name, whole / name.rsplit("-", 2)[0])
