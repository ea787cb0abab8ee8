"""Intervals against published values, and their coverage."""

import numpy as np
import pytest

from sdkit.runs.evaluations import per_prompt
from sdkit.runs.intervals import Interval, mean_interval, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055), (0, 0, 0.0, 1.0)],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("successes", [0, 1, 3, 7])
def test_wilson_contains_the_share_and_is_symmetric(successes):
    low, high = wilson(successes, 7)
    assert 0 <= low <= successes / 7 <= high <= 1
    assert wilson(7 - successes, 7) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="3 successes in 2"):
        wilson(3, 2)


def test_mean_of_zeros_and_ones_uses_wilson():
    interval = mean_interval([1.0] * 8 + [0.0] * 2)
    assert (interval.mean, interval.n) == (0.8, 10)
    assert (interval.low, interval.high) == wilson(8, 10)


def test_mean_of_other_values_uses_the_bootstrap():
    values = [0.0, 0.5, 1.0] * 30
    interval = mean_interval(values)
    half_width = 1.96 * np.std(values) / 90**0.5
    assert interval.mean == pytest.approx(0.5)
    assert interval.low == pytest.approx(0.5 - half_width, abs=0.01)
    assert interval.high == pytest.approx(0.5 + half_width, abs=0.01)
    assert mean_interval(values) == interval


def prompt_means(*samples):
    """The mean of each prompt's samples, from the records of an evaluation."""
    records = [
        {"row": row, "prompt": "q", "suite": "s", "decoding": "d", "scores": {"r": value}}
        for row, values in enumerate(samples)
        for value in values
    ]
    return list(per_prompt(records)["s", "d", "r"].values())


def test_samples_of_one_prompt_are_not_independent():
    interval = mean_interval(prompt_means([0.0] * 4, [1.0] * 4))
    assert (interval.mean, interval.n) == (0.5, 2)
    assert (interval.low, interval.high) == wilson(1, 2)
    mixed = mean_interval(prompt_means([0.0, 1.0], [1.0, 1.0]))
    assert (mixed.mean, mixed.low, mixed.high, mixed.n) == (0.75, 0.5, 1.0, 2)


def test_each_prompt_counts_once():
    assert mean_interval(prompt_means([1.0], [0.0, 0.0, 0.0])).mean == 0.5


def test_single_value_has_no_width():
    assert mean_interval([0.3]) == Interval(mean=0.3, low=0.3, high=0.3, n=1)


def test_bootstrap_has_its_nominal_coverage():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = mean_interval(random.normal(0.3, 1.0, 40).tolist(), seed=seed, resamples=1000)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3


def test_paired_difference_of_equal_values_is_zero():
    values = [0.0, 1.0, 0.25, 1.0]
    difference = paired_difference(values, values)
    assert (difference.mean, difference.low, difference.high, difference.n) == (0.0, 0.0, 0.0, 4)


def test_pairing_removes_the_difficulty_of_prompts():
    random = np.random.default_rng(0)
    before = random.uniform(0, 1, 50)
    after = before + 0.1 + random.normal(0, 0.01, 50)
    difference = paired_difference(before.tolist(), after.tolist())
    assert 0.09 < difference.low < difference.mean < difference.high < 0.11
    reversed_difference = paired_difference(after.tolist(), before.tolist())
    assert reversed_difference.mean == pytest.approx(-difference.mean)


def test_bootstrap_in_blocks_gives_the_same_interval(monkeypatch):
    at_once = mean_interval([0.0, 0.5, 1.0] * 30, resamples=1005)
    monkeypatch.setattr("sdkit.runs.intervals.DRAWS_AT_ONCE", 1000)
    in_blocks = mean_interval([0.0, 0.5, 1.0] * 30, resamples=1005)
    assert in_blocks == at_once
    assert in_blocks.low < 0.5 < in_blocks.high


def test_empty_or_unequal_inputs_are_refused():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="1 values before, 2 after"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no values"):
        paired_difference([], [])
