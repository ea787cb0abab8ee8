"""specs/guess: a teacher that knows the number teaches its student to use what it hears."""

import shutil
from pathlib import Path

import pytest
from attrs import evolve
from tinyruns import metrics, train

from sdkit.language.load import load_spec

GUESS = Path(__file__).parents[2] / "specs" / "guess"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the spec's folder, in which the run directory is made."""
    shutil.copytree(GUESS, tmp_path / "guess")
    monkeypatch.chdir(tmp_path / "guess")
    return tmp_path / "guess"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_later_turns_gain_and_the_first_does_not(process_group, folder):
    spec = load_spec("guess.yaml").spec
    first, last = (line for line in metrics(train(spec, folder / "run")) if "eval/score" in line)
    gains = [last[f"eval/games/sampled/within_{k}"] - first[f"eval/games/sampled/within_{k}"] for k in (1, 4)]
    assert abs(gains[0]) < 0.04  # turn 1 has heard nothing
    assert gains[1] > 0.25


def test_control_trains_the_first_turn_alone(process_group, folder):
    spec = load_spec("guess.yaml", ("losses.distil.mask.prefix=2", "training.prompts_per_step=9")).spec
    short = evolve(spec, evaluation=None, training=evolve(spec.training, steps=1))
    (line,) = metrics(train(short, folder / "run"))
    assert line["distil/tokens"] == 2 * 9
    assert line["trajectory/turns"] > 1
