"""A run that was killed anywhere and resumed equals an uninterrupted run bit by bit."""

import itertools
from pathlib import Path

import pytest
import torch
from kill_scenario import FORMS, PHASES, PIDS, TEACHERS
from os_processes import alive, wait_until
from tinyruns import assert_equal, metrics, run_scenario, weights_of
from vllm_build import require_vllm

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
    "ema-qlora-2-1-update@4",
)
"""Every pair of teacher, form, stage, number of ranks and phase, and 4-bit weights; one attempt after the other.

A run has six steps, checkpoints after 2 and 4, evaluations at 0, 3 and 6.
"""
EVERY_PLACE = (
    "rollout@0,update@0,boundary@1,teacher@1,boundary@2,save@2,manifest@2,naming@2,rollout@2,update@2,boundary@3,"
    "evaluation@3,boundary@4,save@4,manifest@4,naming@4,teacher@4,update@4,boundary@5,rollout@5,model@6"
)
"""Every boundary between steps, and every phase: before, between and after the checkpoints."""


TRAJECTORIES = "frozen-played-0-1-turn@1,environment@1,rollout@2,update@2"
"""Killed while the second turn is sampled, while the environment answers it, before the reward, and in the update."""
TRAJECTORIES_EVERYWHERE = "turn@0,environment@0,turn@1,environment@2,rollout@2,update@2,environment@3,turn@4,update@5"


def matrix(stage, ranks):
    """Cases of every teacher and form, killed at every place."""
    names = itertools.product(TEACHERS, FORMS)
    return [f"{weights}-{form}-{stage}-{ranks}-{EVERY_PLACE}" for weights, form in names]


def assert_same_run(folder, straight):
    assert metrics(folder) == metrics(straight)
    trained = weights_of(straight)
    for name, value in weights_of(folder).items():
        assert_equal(value, trained[name])
    for folder_name in ("rollouts", "samples", "evaluations"):
        texts = [{p.name: p.read_text() for p in (f / folder_name).iterdir()} for f in (folder, straight)]
        assert texts[0] == texts[1]
    checkpoints = {p.name for p in (folder / "checkpoints").iterdir()}
    # A run killed between naming a checkpoint and deleting the previous one keeps both until the next save.
    older = {"step_000002"} if "naming@4" in folder.name else set()
    assert checkpoints - older == {"step_000004"}


@pytest.fixture(scope="module")
def work(warm, tiny_folder, tmp_path_factory):
    return run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("killed"), (*COVER, TRAJECTORIES))


def test_cases_cover_every_pair():
    def settings(case):
        *case_settings, places = case.split("-")
        return *case_settings, [place.split("@")[0] for place in places.split(",")]

    # The full matrix has the rest: teachers with the same state, stage 1, and a kill while the final model is saved.
    kinds = ("student", "frozen", "ema", "copy")
    axes = (kinds, FORMS, "023", "12", PHASES.keys() - {"model"})
    pairs = [
        [pair for phase in phases for pair in itertools.combinations(enumerate((*case_settings, phase)), 2)]
        for *case_settings, phases in map(settings, COVER)
    ]
    covered = set(itertools.chain(*pairs))
    for (i, left), (j, right) in itertools.combinations(enumerate(axes), 2):
        missing = {(a, b) for a in left for b in right if ((i, a), (j, b)) not in covered}
        assert not missing


@pytest.mark.parametrize("name", COVER)
def test_killed_run_resumes_to_the_same_result(work, name):
    assert_same_run(work / name, work / name.rsplit("-", 1)[0])


def test_run_killed_within_trajectories_resumes_to_the_same_result(work):
    assert_same_trajectories(work, TRAJECTORIES)


def assert_same_trajectories(work, name):
    straight = work / name.rsplit("-", 1)[0]
    assert_same_run(work / name, straight)
    turns = [line["trajectory/turns"] for line in metrics(straight) if "trajectory/turns" in line]
    assert max(turns) > 1
    pids = [int(pid) for pid in (work / PIDS).read_text().split()]
    assert len(pids) > 20
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.full
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
def test_run_killed_anywhere_within_trajectories_resumes_to_the_same_result(warm, tiny_folder, tmp_path, stage, ranks):
    name = f"ema-played-{stage}-{ranks}-{TRAJECTORIES_EVERYWHERE}"
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, [name])
    assert_same_trajectories(tmp_path, name)


@pytest.mark.full
@pytest.mark.timeout(0)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_full_matrix_resumes_to_the_same_results(warm, tiny_folder, tmp_path, stage, ranks):
    cases = matrix(stage, ranks)
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, cases)
    for name in cases:
        assert_same_run(tmp_path / name, tmp_path / name.rsplit("-", 1)[0])


@pytest.mark.full
@pytest.mark.timeout(0)
def test_killed_run_with_vllm_resumes_to_the_same_result(warm, tiny_folder, tmp_path):
    """The same tokens; other figures agree within the noise of vLLM's kernels."""
    require_vllm()
    name = "ema-vllm-0-1-rollout@2,boundary@3"
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, [name])
    folder, straight = tmp_path / name, tmp_path / name.rsplit("-", 1)[0]
    for ours, theirs in zip(metrics(folder), metrics(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for key, value in weights_of(straight).items():
        torch.testing.assert_close(weights_of(folder)[key], value, atol=1e-5, rtol=1e-4)
