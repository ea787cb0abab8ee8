"""Transfer, forgetting and retention of tasks in sequence, by arithmetic that can be done in the head."""

import math

import numpy as np
import pytest

from sdkit.runs.intervals import difference_of_changes, mean_interval, paired_difference
from sdkit.runs.seed_intervals import error_of_columns, widened
from sdkit.runs.transfer import Change, Trajectory, difference, estimate, matrix, metric_changes, metrics, retention

SUITES = {"a": "one", "b": "two", "c": "three", "kept": None}


def scores(right, n=10):
    """Of n prompts the first `right` score 1."""
    return {f"prompt {i}": float(i < right) for i in range(n)}


def trajectory(*rows, stages=("one", "two", "three")):
    """From rows of the numbers of right answers of 10, suite by suite."""
    suites = dict(list(SUITES.items())[: len(rows[0])])
    return Trajectory(
        stages=stages,
        suites=suites,
        rows=tuple({s: scores(x) for s, x in zip(suites, row, strict=True)} for row in rows),
    )


RUN = trajectory((0, 1, 2, 9), (6, 2, 2, 8), (5, 8, 4, 7), (2, 7, 9, 6))


def means(intervals):
    return {name: round(interval.mean, 6) for name, interval in intervals.items()}


def test_metrics_follow_their_definitions():
    assert means(metrics([RUN])) == {
        "accuracy": 0.6,  # (2 + 7 + 9) / 30
        "learned": round((6 + 6 + 5) / 30, 6),
        "backward_transfer": -0.25,  # (2 − 6 + 7 − 8) / 20
        "forward_transfer": 0.15,  # (2 − 1 + 4 − 2) / 20
        "forgetting": 0.25,  # (6 − 2 + 8 − 7) / 20
    }
    assert means(retention([RUN])) == {"kept": -0.3}
    assert [means(row) for row in matrix([RUN])][2] == {"a": 0.5, "b": 0.8, "c": 0.4, "kept": 0.7}


def test_forgetting_is_from_the_best_score_and_may_come_before_the_task():
    run = trajectory((0, 0, 0), (3, 9, 0), (7, 5, 0), (4, 6, 8))
    assert means(metrics([run]))["forgetting"] == 0.3  # (7 − 4 + 9 − 6) / 20
    assert means(metrics([run]))["backward_transfer"] == 0.1  # (4 − 3 + 6 − 5) / 20


def test_a_sequence_that_has_not_finished_has_the_rows_so_far():
    run = trajectory((0, 1, 2), (6, 2, 2))
    assert not run.is_complete
    assert len(matrix([run])) == 2


def test_one_suite_and_one_seed_has_the_interval_of_its_prompts():
    assert estimate([RUN], [Change("a", 3, 1)]) == paired_difference(
        list(scores(6).values()), list(scores(2).values())
    )
    assert estimate([RUN], [Change("a", 3)]) == mean_interval(list(scores(2).values()))


def test_suites_are_combined_by_the_squares_of_their_distances():
    parts = [estimate([RUN], [Change(suite, 3)]) for suite in ("a", "b")]
    both = estimate([RUN], [Change("a", 3), Change("b", 3)])
    assert both.mean == pytest.approx(0.45)
    assert both.mean - both.low == pytest.approx(math.hypot(*(p.mean - p.low for p in parts)) / 2)
    assert both.high - both.mean == pytest.approx(math.hypot(*(p.high - p.mean for p in parts)) / 2)
    assert both.n == 20


def test_seeds_add_their_own_spread():
    other = trajectory((0, 1, 2, 9), (6, 2, 2, 8), (5, 8, 4, 7), (4, 7, 9, 6))
    alone, both = (estimate(runs, [Change("a", 3)]) for runs in ([RUN, RUN], [RUN, other]))
    assert both.mean == pytest.approx(0.3)
    assert alone.mean == pytest.approx(0.2)
    # Two prompts are right under both seeds, two under one.
    table = np.array([[1.0, 1.0]] * 2 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 6)
    expected = widened(mean_interval(table.mean(axis=1).tolist()), [error_of_columns([(table, 1.0)])])
    assert [both.low, both.high] == pytest.approx([expected.low, expected.high])


def test_two_sequences_are_compared_prompt_by_prompt():
    better = trajectory((0, 1, 2, 9), (6, 2, 2, 8), (5, 8, 4, 7), (6, 8, 9, 6))
    changes = tuple(metric_changes([run])["backward_transfer"] for run in (better, RUN))
    interval = difference([better], [RUN], changes)
    assert interval.mean == pytest.approx(0.25)  # 0 − −0.25
    fewer = trajectory((0, 1), (6, 2), (5, 8), stages=("one", "two"))
    assert difference([fewer], [RUN], (metric_changes([fewer])["accuracy"], metric_changes([RUN])["accuracy"])) is None
    assert difference([better], [RUN, RUN], changes) is None


def test_differences_of_changes_have_width_even_without_any():
    nothing = np.zeros(50)
    interval = difference_of_changes(nothing, nothing, nothing, nothing)
    assert interval.mean == 0
    assert -0.2 < interval.low < 0 < interval.high < 0.2
    with pytest.raises(ValueError, match="values"):
        difference_of_changes(nothing, nothing, nothing, nothing[:2])


def test_intervals_of_backward_transfer_cover_its_true_value():
    """Of 1,000 drawn sequences of two tasks, one seed, 95 % intervals cover at least 93 %."""
    rng = np.random.default_rng(0)
    right, kept, lost = 0.7, 0.6, 0.05  # P(right after its stage), P(still right | right), P(right now | wrong)
    truth = right * kept + (1 - right) * lost - right
    covered = 0
    for _ in range(1000):
        before = rng.random(60) < right
        after = np.where(before, rng.random(60) < kept, rng.random(60) < lost)
        rows = [{"a": dict(enumerate(map(float, values)))} for values in (before, before, after)]
        run = Trajectory(stages=("one", "two"), suites={"a": "one"}, rows=tuple(rows))
        interval = estimate([run], [Change("a", 2, 1)])
        covered += interval.low <= truth <= interval.high
    assert covered >= 930
