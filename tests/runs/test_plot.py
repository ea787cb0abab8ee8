"""Plots: every suite is shown under its own name, and no two lines of a panel look alike."""

from pathlib import Path

import pytest

from sdkit.runs.history import Point, Run
from sdkit.runs.intervals import Interval
from sdkit.runs.plot import figure_of_run, figure_of_runs

KEYS = [
    (suite, decoding, reward)
    for suite in ("sums", "words")
    for decoding in ("greedy", "drawn")
    for reward in ("right", "form")
]


def lines(keys, value=0.5):
    scores = {}
    for key in keys:
        name = "eval/" + "/".join(key)
        scores |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1, f"{name}_n": 4}
    steps = [{"step": step, "loss": 1.0, "rollout/completion_tokens": 9.0} for step in (1, 2)]
    return [{"step": 0, **scores}, *steps, {"step": 2, "eval/score": value, "eval/loss": 1.0, **scores}]


def run(name, keys):
    scores = {key: Interval(mean=0.5, low=0.4, high=0.6, n=4) for key in keys}
    points = [Point(step=step, tokens=10.0 * step, seconds=2.0 * step, scores=scores) for step in (0, 2)]
    return Run(name=name, path=Path(name), state="done", settings={}, origins={}, points=points)


def looks(axis):
    return [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.get_lines()]


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_each_suite_of_a_run_has_a_panel_with_its_name():
    axes = figure_of_run(lines(KEYS), "a run").axes
    assert [axis.get_title() for axis in axes[:4]] == [
        "loss",
        "sums (held out), 95 % intervals",
        "words (held out), 95 % intervals",
        "completion length, tokens",
    ]
    for panel in axes[1:3]:
        assert labels(panel) == ["right, greedy", "form, greedy", "right, drawn", "form, drawn"]
        assert len(set(looks(panel))) == 4


def test_run_without_suites_has_two_panels():
    assert [axis.get_title() for axis in figure_of_run(lines([]), "a run").axes] == [
        "loss",
        "completion length, tokens",
    ]


@pytest.mark.parametrize(("value", "full"), [(0.5, True), (40.0, False)])
def test_scores_between_0_and_1_are_drawn_on_the_full_scale(value, full):
    panel = figure_of_run(lines(KEYS[:1], value), "a run").axes[1]
    assert (panel.get_ylim() == (-0.02, 1.02)) is full


def test_each_suite_of_a_comparison_has_a_row_with_its_name():
    figure = figure_of_runs([run("a", KEYS), run("b", KEYS[:4])], [key for key in KEYS if key[2] == "right"])
    rows = [figure.axes[i : i + 3] for i in (0, 3)]
    assert [row[0].get_ylabel() for row in rows] == ["right on sums", "right on words"]
    assert labels(rows[0][0]) == ["a, greedy", "a, drawn", "b, greedy", "b, drawn"]
    assert labels(rows[1][0]) == ["a, greedy", "a, drawn"]  # the other run has no such suite
    for panel in rows[0]:
        assert len(set(looks(panel))) == 4
