"""Divergence: which steps are far off, when a run has diverged, and that it then does not end as done."""

import math

import pytest
from tinyruns import lines, make_spec, read_status, silent_console, train, training, with_evaluation

from sdkit.language.errors import Diverged
from sdkit.language.specs import OptimizerSpec
from sdkit.runs.evaluations import EvaluationResult
from sdkit.train.divergence import DivergenceWatch, fallen_score

KEY = ("sums", "greedy", "right")


def steps(losses, norms=None):
    norms = norms or [1.0] * len(losses)
    return [
        {"step": i, "loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]


DIVERGED = {
    "loss": (steps([0.95, 9868, 22704]), "steps 2 to 3: the loss is 2.27e+04, far above its median of 0.95 before"),
    "one step after the first": (steps([0.5, 21]), "steps 2 to 2: the loss is 21"),
    "gradient": (
        steps([1.0] * 5, [2.0, 2.0, 1500, 1500, 1500]),
        "steps 3 to 5: the gradient norm is 1500, far above its median of 2",
    ),
    "skipped": (steps([1.0] * 4, [2.0] + [math.inf] * 3), "the gradient norm is not finite; its median was 2 before"),
}
HEALTHY = {
    "steady": steps([2.0, 1.5, 1.0, 0.5]),
    "from 0": steps([0.0, 0.0, 0.5, 3.0, 5.0], [0.0, 0.0, 10.0, 40.0, 80.0]),
    "a spike at the end": steps([1.0] * 6 + [1e4]),
    "recovered": steps([1.0, 1e4, 1e4, 1e4, 1.0]),
    "negative": steps([-0.1, -50.0, -50.0, -50.0]),
    "large from the start": steps([500.0, 900.0, 700.0], [3000.0, 9000.0, 4000.0]),
    "one step": steps([1e9]),
    "no update": [{"step": i} for i in range(1, 5)],
}


@pytest.mark.parametrize(("run", "verdict"), DIVERGED.values(), ids=DIVERGED)
def test_run_whose_last_steps_are_far_off_has_diverged(run, verdict):
    assert verdict in str(DivergenceWatch(3, run).verdict())


@pytest.mark.parametrize("run", HEALTHY.values(), ids=HEALTHY)
def test_healthy_run_has_not_diverged(run):
    assert DivergenceWatch(3, run).verdict() is None


def test_warning_comes_once_also_after_a_resume():
    run = steps([1.0, 1.0] + [100.0] * 5)
    watch = DivergenceWatch(3)
    warnings = [watch.add(line) for line in run]
    assert [bool(warning) for warning in warnings] == [False] * 4 + [True, False, False]
    resumed = DivergenceWatch(3, run[:4])
    assert resumed.add(run[4]) == warnings[4]
    assert resumed.add(run[5]) is None


def evaluation(right, of=100):
    scores = (1.0,) * right + (0.0,) * (of - right)
    return EvaluationResult(scores={KEY: scores}, records=[], tokens=0)


def test_score_falls_by_more_than_chance():
    best = evaluation(60)
    assert fallen_score(best, evaluation(58), KEY, 3) is None
    assert fallen_score(best, evaluation(40), KEY, 3) == "sums greedy right fell from 0.600 at its best to 0.400"
    assert fallen_score(evaluation(2, of=4), evaluation(0, of=4), KEY, 3) is None


def test_run_that_blew_up_ends_as_diverged(tiny_folder, tmp_path):
    spec = with_evaluation(make_spec(tiny_folder, optimizer=OptimizerSpec(lr=20), training=training(steps=3)))
    console, folder = silent_console(), tmp_path / "run"
    with pytest.raises(Diverged, match=r"the run diverged: steps 2 to 3: the loss is") as caught:
        train(spec, folder, console)
    assert caught.value.exit_code == 9
    assert read_status(folder) == read_status(folder) | {"state": "diverged", "step": 3, "reason": str(caught.value)}
    assert (folder / "result.json").is_file()
    assert (folder / "model").is_dir()
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3]
