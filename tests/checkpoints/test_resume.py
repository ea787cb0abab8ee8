"""A run that was killed, wherever that was, and taken up again is the run that nobody killed: bit by bit."""

import itertools
from pathlib import Path

import pytest
import torch
from kill_scenario import FORMS, PHASES, TEACHERS
from tinyruns import metrics, run_scenario, same, weights_of

SCENARIO = Path(__file__).parents[1] / "support" / "kill_scenario.py"
COVER = (
    "student-full-0-1-rollout@1,save@2,manifest@4",
    "student-full-2-2-naming@2,boundary@5",
    "student-lora-3-1-teacher@2,evaluation@3,update@4",
    "frozen-lora-0-2-naming@2,teacher@2,evaluation@3",
    "frozen-lora-2-1-save@2,manifest@4,rollout@4",
    "frozen-full-3-1-boundary@1,update@3",
    "ema-full-0-2-rollout@2,evaluation@3,update@5",
    "ema-lora-2-1-teacher@1,boundary@4",
    "ema-lora-3-1-manifest@2,naming@2,save@4",
    "copy-full-0-1-naming@2,boundary@3,teacher@5",
    "copy-lora-2-1-evaluation@3,update@4",
    "copy-full-3-2-save@2,manifest@2,rollout@4",
    "routed-full-2-1-boundary@2,update@4",
)
"""Every pair of teacher, form, stage, number of ranks and phase; one attempt after the other.

A run has six steps; checkpoints stand at 2 and 4, evaluations at 0, 3 and 6.
"""
WHOLE = (
    "rollout@0,update@0,boundary@1,teacher@1,boundary@2,save@2,manifest@2,naming@2,rollout@2,update@2,boundary@3,"
    "evaluation@3,boundary@4,save@4,manifest@4,naming@4,teacher@4,update@4,boundary@5,rollout@5,model@6"
)
"""Every boundary between steps, and every phase: before, between and behind the checkpoints."""


def matrix(stage, ranks):
    """Every teacher and form, killed everywhere."""
    names = itertools.product(TEACHERS, FORMS)
    return [f"{weights}-{form}-{stage}-{ranks}-{WHOLE}" for weights, form in names]


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
    older = {"step_000002"} if "naming@4" in folder.name else set()
    assert left - older == {"step_000004"}


@pytest.fixture(scope="module")
def work(warm, tiny_folder, tmp_path_factory):
    return run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("killed"), COVER)


def test_every_pair_is_covered():
    def settings(case):
        *found, places = case.split("-")
        return *found, [place.split("@")[0] for place in places.split(",")]

    # What remains is for the whole matrix: other moves of the same state, stage 1, and a run that is done but for its model.
    kinds = ("student", "frozen", "ema", "copy")
    axes = (kinds, FORMS, "023", "12", PHASES.keys() - {"model"})
    held = [
        [pair for phase in phases for pair in itertools.combinations(enumerate((*found, phase)), 2)]
        for *found, phases in map(settings, COVER)
    ]
    covered = set(itertools.chain(*held))
    for (i, left), (j, right) in itertools.combinations(enumerate(axes), 2):
        missing = {(a, b) for a in left for b in right if ((i, a), (j, b)) not in covered}
        assert not missing


@pytest.mark.parametrize("name", COVER)
def test_a_killed_run_is_taken_up_as_it_was(work, name):
    assert_same_run(work / name, work / name.rsplit("-", 1)[0])


@pytest.mark.full
@pytest.mark.timeout(0)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_whole_matrix(warm, tiny_folder, tmp_path, stage, ranks):
    cases = matrix(stage, ranks)
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, cases)
    for name in cases:
        assert_same_run(tmp_path / name, tmp_path / name.rsplit("-", 1)[0])


@pytest.mark.full
@pytest.mark.timeout(0)
def test_a_run_that_vllm_samples_is_taken_up_as_it_was(warm, tiny_folder, tmp_path):
    """The same tokens; numbers within what vLLM's kernels leave open."""
    pytest.importorskip("vllm")
    name = "ema-vllm-0-1-rollout@2,boundary@3"
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, [name])
    folder, straight = tmp_path / name, tmp_path / name.rsplit("-", 1)[0]
    for ours, theirs in zip(metrics(folder), metrics(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for key, value in weights_of(straight).items():
        torch.testing.assert_close(weights_of(folder)[key], value, atol=1e-5, rtol=1e-4)
