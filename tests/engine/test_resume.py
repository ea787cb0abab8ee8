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
CHAINS = (
    "student-full-0-rollout@2,teacher@3,save@4,update@4,boundary@5",
    "frozen-lora-0-teacher@2,update@3,manifest@4,rollout@4,boundary@5",
    "ema-full-0-update@2,boundary@3,naming@4,teacher@4,rollout@5",
    "copy-lora-0-rollout@2,evaluation@3,save@4,teacher@4,update@5",
)
"""Every teacher killed in every phase, one attempt after the other; checkpoints stand at steps 2 and 4."""
BETWEEN = {"evaluation": 3, "save": 4, "manifest": 4, "naming": 4}
"""Phases that are not in every step, and a step after which they come."""


def matrix():
    """Every teacher, form, phase and stage alone; and a kill at every boundary between steps."""
    for weights, form, stage in itertools.product(TEACHERS, FORMS, (0, 1, 2, 3)):
        places = [f"{phase}@{BETWEEN.get(phase, 3)}" for phase in PHASES]
        places += [f"boundary@{at}" for at in range(4, STEPS)]
        yield from (f"{weights}-{form}-{stage}-{place}" for place in places)


def run_all(folder, work, cases, hours=1):
    done = subprocess.run(
        [sys.executable, SCENARIO, folder, work, *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=hours * 3600,
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
    left = {p.name for p in (folder / "checkpoints").iterdir()}
    # Killed between the naming of a checkpoint and the end of the one before, a run keeps both until its next.
    older = {"step_000002"} if "naming" in folder.name else set()
    assert left - older == {"step_000004"}


@pytest.fixture(scope="module")
def work(tiny_folder, tmp_path_factory):
    return run_all(tiny_folder, tmp_path_factory.mktemp("killed"), CHAINS)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CHAINS)
def test_a_killed_run_is_taken_up_as_it_was(work, name):
    assert_same_run(work / name, work / name.rsplit("-", 1)[0])


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run_all(tiny_folder, tmp_path_factory.mktemp("matrix"), matrix(), hours=8)


@pytest.mark.full
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", list(matrix()))
def test_the_whole_matrix(whole, name):
    assert_same_run(whole / name, whole / name.rsplit("-", 1)[0])
