"""The Python API for specs and runs; tests/test_docs.py runs the examples of docs/api.md."""

import json
from pathlib import Path

import pytest

import sdkit
from sdkit.language.errors import UnreadableInput

READERS = [sdkit.read_status, sdkit.read_metrics, sdkit.read_rollouts, sdkit.read_evaluations]
BAD = Path(__file__).parent / "err" / "choice.yaml"


def test_invalid_spec_is_raised_with_its_problems():
    with pytest.raises(sdkit.InvalidSpec, match="= did you mean") as caught:
        sdkit.load_spec(BAD)
    assert list(caught.value.problems) == sdkit.check_spec(BAD)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value, sdkit.SdkitError)
    assert {"path", "file", "line", "column", "code", "message", "hint"} <= set(caught.value.problems[0].as_dict())


def test_overrides_reach_every_function():
    overrides = ["losses.distil.divergence=reverse_kl"]
    spec = sdkit.load_spec("sdft", overrides)
    assert sdkit.resolve_spec(spec)["losses"]["distil"]["divergence"]["kind"] == "reverse_kl"
    assert "reverse_kl" in sdkit.show_spec("sdft", overrides)
    assert sdkit.check_spec("sdft", ["losses.distil.divergence=revers_kl"])


def test_run_file_gives_an_experiment_and_a_plan():
    folder = Path(__file__).parents[1] / "specs"
    spec = sdkit.load_spec(folder / "sdft.yaml")
    assert isinstance(spec, sdkit.ExperimentSpec)
    assert sdkit.plan_spec(spec, folder).peak_gib > 0


@pytest.fixture
def run(tmp_path):
    (tmp_path / "resolved.yaml").write_text("{}")
    (tmp_path / "provenance.json").write_text('{"base": "."}')
    for folder, number in (("rollouts", 0), ("rollouts", 1), ("evaluations", 0), ("evaluations", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"step_{number:06d}.jsonl").write_text(json.dumps({"row": number}) + "\n")
    return tmp_path


def test_steps_of_rollouts_and_evaluations_match_the_metrics(run):
    """The rollouts of step 1 are in the file of batch 0; an evaluation's file has the number of its step."""
    assert sdkit.read_rollouts(run) == [{"step": 1, "row": 0}, {"step": 2, "row": 1}]
    assert sdkit.read_rollouts(run, step=2) == [{"step": 2, "row": 1}]
    assert sdkit.read_evaluations(run) == [{"step": 0, "row": 0}, {"step": 2, "row": 2}]
    assert sdkit.read_evaluations(run, step=1) == []


def test_killed_run_can_be_read(run):
    assert (sdkit.read_status(run), sdkit.read_metrics(run)) == ({}, [])
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert sdkit.read_metrics(run) == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_folder_without_a_run_is_refused(read, tmp_path):
    with pytest.raises(UnreadableInput, match="is not a run directory"):
        read(tmp_path)
