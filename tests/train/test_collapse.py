"""Tripwires for a collapse: when they warn, that they warn once, and that one that stops a run leaves it resumable."""

import pytest
from attrs import evolve
from tinyruns import lines, make_spec, read_status, silent_console, train, training

from sdkit.language.errors import Diverged
from sdkit.language.specs import CollapseSpec, OptimizerSpec, OutputSpec, ScoreCollapse, StepCollapse
from sdkit.runs.directory import RunDirectory
from sdkit.runs.evaluations import read_back
from sdkit.train.collapse import ScoreCollapseWatch, StepCollapseWatch
from sdkit.train.run_watch import RunWatch
from sdkit.train.tripwires import TripwireWarning

KEY = ("sums", "greedy", "right")
# Of a run of the shipped demo, specs/sdft.yaml, by step: tokens, and nats at sampled tokens.
DEMO_LENGTHS = [13.9375, 3.125, 10.0, 12.9688, 9.9062, 9.3438, 8.7188, 7.3125, 7.75, 8.5938, 8.8438, 8.75]
DEMO_ENTROPIES = [1.9877, 1.9875, 2.3334, 1.015, 0.7057, 0.8589, 0.8708, 0.5722, 0.5948, 0.6082, 0.7792, 0.773]


def watched(values, metric="rollout/completion_tokens", name="length", **changes):
    watch = StepCollapseWatch(name, StepCollapse(**({"share": 0.5, "steps": 2} | changes)))
    return [watch.add({"step": i, metric: value}) for i, value in enumerate(values, 1)]


COLLAPSED = {
    "falls": (
        [40, 42, 41, 8, 7],
        [5],
        "the mean completion length is 7 tokens, less than 0.5 × its median of 41 before",
    ),
    "once": ([40, 40, 8, 8, 8, 8], [4], "of 40 before"),
    "again": ([40, 40, 8, 8, 40, 9, 9], [4, 7], "of 40 before"),
}


@pytest.mark.parametrize(("values", "steps", "cause"), COLLAPSED.values(), ids=COLLAPSED)
def test_length_that_stays_low_warns_once(values, steps, cause):
    warnings = [w for w in watched(values) if w]
    assert [w.step for w in warnings] == steps
    assert cause in str(warnings[-1])
    assert {w.wire for w in warnings} == {"collapsed_length"}


HEALTHY = {
    "steady": [40, 38, 41, 39, 40],
    "one dip": [40, 40, 8, 40, 8, 40],
    "slowly shorter": [40, 35, 30, 26, 23, 21, 20],
    "short from the start": [1, 1, 1, 1],
    "nothing sampled": [40, 40, float("nan"), float("nan")],
}


@pytest.mark.parametrize("values", HEALTHY.values(), ids=HEALTHY)
def test_healthy_length_does_not_warn(values):
    assert not any(watched(values))


def test_entropy_near_zero_warns():
    (warning,) = filter(None, watched([1.2, 1.0, 0.01, 0.02], "rollout/entropy", "entropy", action="stop"))
    assert "the entropy at sampled tokens is 0.02 nats" in warning.cause
    assert warning.stops


def test_no_step_of_the_demo_counts_at_the_default_share():
    share = StepCollapse().share
    assert not any(watched(DEMO_LENGTHS, share=share, steps=1))
    assert not any(watched(DEMO_ENTROPIES, "rollout/entropy", "entropy", share=share, steps=1))


FALL = TripwireWarning(wire="fallen_score", first=1, step=9, cause="fell", look_at="")


def test_score_warns_after_enough_evaluations_in_a_row():
    watch = ScoreCollapseWatch(ScoreCollapse(share=0.5, evaluations=2), {0: 0.2, 5: 0.8}, warned=())
    assert watch.add(10, 0.3, FALL) is None
    assert watch.is_below
    warning = watch.add(15, 0.3, FALL)
    assert warning is not None
    assert (warning.wire, warning.first, warning.stops) == ("collapsed_score", 10, False)
    assert watch.add(20, 0.3, FALL) is None
    assert watch.add(25, 0.7, None) is None
    assert not watch.is_below


def test_score_waits_until_the_fall_is_more_than_chance():
    watch = ScoreCollapseWatch(ScoreCollapse(share=0.5, evaluations=2), {0: 0.8, 5: 0.3}, warned=())
    assert watch.add(10, 0.3, None) is None
    assert watch.add(15, 0.3, FALL) is not None


@pytest.mark.parametrize(("warned", "warns"), [((), True), ((10,), False)])
def test_resumed_watch_of_the_score_knows_its_warning(warned, warns):
    history = {0: 0.8, 5: 0.3, 10: 0.3}
    watch = ScoreCollapseWatch(ScoreCollapse(share=0.5, evaluations=2), history, warned)
    assert bool(watch.add(15, 0.3, FALL)) is warns


def evaluation(right, of=100):
    record = {"suite": "sums", "decoding": "greedy", "prompt": ""}
    return read_back([{**record, "row": i, "scores": {"right": float(i < right)}} for i in range(of)])


def test_run_with_less_than_half_of_its_best_score_has_diverged(tmp_path):
    watch = RunWatch(OutputSpec(), RunDirectory(tmp_path, tensorboard=False), [])
    assert watch.evaluated(0, evaluation(60), KEY) == []
    (fall,) = watch.evaluated(5, evaluation(40), KEY)
    assert str(fall) == "steps 0 to 5: sums greedy right fell from 0.600 at its best to 0.400"
    assert watch.verdict() is None
    (fall,) = watch.evaluated(10, evaluation(20), KEY)
    assert fall.wire == "fallen_score"
    assert watch.verdict() == "sums greedy right fell from 0.600 at its best to 0.200"
    (collapse,) = watch.evaluated(15, evaluation(10), KEY)
    assert (collapse.wire, collapse.first, collapse.step, watch.stop) == ("collapsed_score", 10, 15, None)
    watch.evaluated(20, evaluation(59), KEY)
    assert watch.verdict() is None


def test_run_that_stops_at_a_collapse_can_be_resumed(tiny_folder, tmp_path):
    """The learning rate leaves nothing of the model's distribution."""
    collapse = CollapseSpec(entropy=StepCollapse(share=0.5, steps=1, action="stop"))
    spec = make_spec(
        tiny_folder,
        optimizer=OptimizerSpec(lr=20),
        training=training(steps=4),
        output=OutputSpec(tensorboard=False, collapse=collapse),
    )
    console, folder = silent_console(), tmp_path / "run"
    with pytest.raises(Diverged, match=r"less than 0\.5 × its median of .* before; stopped, --resume continues"):
        train(spec, folder, console)
    status = read_status(folder)
    assert (status["state"], status["step"]) == ("diverged", 2)
    (warning,) = [w for w in lines(folder / "warnings.jsonl") if w["wire"] == "collapsed_entropy"]
    assert (warning["since"], warning["step"]) == (2, 2)
    assert (folder / "model").is_dir()
    gentle = evolve(spec, output=evolve(spec.output, tripwire_steps=None))
    train(gentle, folder, resume=True)
    assert read_status(folder)["state"] == "done"
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
