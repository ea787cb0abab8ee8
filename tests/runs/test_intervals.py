"""Intervals against published values, and their coverage."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from scipy.stats import beta, binom

from sdkit.runs.evaluations import per_prompt
from sdkit.runs.intervals import (
    GAFFKE,
    NEWCOMBE,
    STUDENT,
    TANGO,
    WILSON,
    mean_interval,
    paired_difference,
    tango,
    unpaired_difference,
    wilson,
)


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


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((1, 7, 21), -0.517, -0.026),  # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, 2850-2875
        ((0, 0, 2), -0.6576, 0.6576),  # ± z² / (n + z²)
        ((100, 0, 100), 0.9260, 1.0),  # 1 − 2 z² / (n + z²): Wilson's interval of 100 in 100, from −1 to 1
    ],
)
def test_tango_known_values(counts, low, high):
    assert tango(*counts) == pytest.approx((low, high), abs=5e-4)


def test_tango_is_antisymmetric_and_refuses_nonsense():
    low, high = tango(3, 1, 9)
    assert tango(1, 3, 9) == pytest.approx((-high, -low))
    for counts in [(2, 1, 2), (-1, 0, 2), (0, 0, 0)]:
        with pytest.raises(ValueError, match="gained and"):
            tango(*counts)


def test_mean_of_zeros_and_ones_uses_wilson():
    interval = mean_interval([1.0] * 8 + [0.0] * 2)
    assert (interval.mean, interval.n, interval.method) == (0.8, 10, WILSON)
    assert (interval.low, interval.high) == wilson(8, 10)


def test_mean_of_scores_from_0_to_1_uses_gaffke():
    values = [0.0, 0.5, 1.0] * 30
    interval = mean_interval(values)
    half_width = 1.96 * np.std(values) / 90**0.5
    assert (interval.mean, interval.method) == (pytest.approx(0.5), GAFFKE)
    assert interval.low == pytest.approx(0.5 - half_width, abs=0.01)
    assert interval.high == pytest.approx(0.5 + half_width, abs=0.01)
    assert mean_interval(values) == interval


def test_gaffke_of_zeros_and_ones_is_clopper_and_pearson():
    interval = mean_interval([0.0] * 7 + [1.0 - 1e-9] * 3, resamples=50_000)  # 1 itself would use Wilson
    assert interval.low == pytest.approx(beta.ppf(0.025, 3, 8), abs=0.005)
    assert interval.high == pytest.approx(beta.ppf(0.975, 4, 7), abs=0.005)


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
    assert (mixed.mean, mixed.n) == (0.75, 2)
    assert 0 < mixed.low < 0.5
    assert 0.95 < mixed.high <= 1


def test_each_prompt_counts_once():
    assert mean_interval(prompt_means([1.0], [0.0, 0.0, 0.0])).mean == 0.5


@pytest.mark.parametrize("values", [[0.3], [0.5] * 5, [0.0], [1.0] * 100])
def test_equal_scores_do_not_make_a_mean_certain(values):
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(values[0])
    assert interval.high - interval.low > 3 / (len(values) + 4)


@pytest.mark.parametrize("values", [[2.0], [-1.0, -1.0], [40.0] * 50])
def test_equal_scores_without_bounds_leave_the_mean_open(values):
    interval = mean_interval(values)
    assert (interval.low, interval.high, interval.method) == (-math.inf, math.inf, STUDENT)


def test_student_has_its_nominal_coverage():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = mean_interval(random.normal(0.3, 1.0, 40).tolist(), seed=seed, resamples=1000)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3


SHARES = {"near 0": (0.0, 0.1), "near 0.5": (0.45, 0.55), "near 1": (0.9, 1.0)}
"""Ranges to average over: the coverage of a score interval jumps at the shares that one more success includes."""
LOWEST = 0.83
"""The coverage of Wilson's interval at its worst share, near the ends (Brown, Cai and DasGupta 2001)."""
wilson_of, tango_of = cache(wilson), cache(tango)


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("name", SHARES)
def test_wilson_has_its_nominal_coverage(name, n):
    coverage = []
    for share in np.linspace(*SHARES[name], 11):
        includes = [low <= share <= high for low, high in (wilson_of(k, n) for k in range(n + 1))]
        coverage.append(binom.pmf(range(n + 1), n, share) @ includes)
    assert 0.93 <= np.mean(coverage) <= (0.97 if name == "near 0.5" else 1)
    assert min(coverage) >= LOWEST


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("lost", [0.0, 0.3, 1.0])
def test_tango_has_its_nominal_coverage(name, lost, n):
    """`lost` is the share of prompts lost among those not gained."""
    coverage = [_tango_coverage(n, gained, lost * (1 - gained)) for gained in np.linspace(*SHARES[name], 4)]
    assert np.mean(coverage) >= 0.93
    assert min(coverage) >= LOWEST


def _tango_coverage(n, gained, lost):
    """The probability that the interval includes gained − lost, over all outcomes that are not too rare to matter."""
    total = 0.0
    chances = binom.pmf(range(n + 1), n, gained)
    for k in np.flatnonzero(chances > 1e-4):
        chances_lost = binom.pmf(range(n - k + 1), n - k, lost / (1 - gained) if gained < 1 else 0.0)
        for j in np.flatnonzero(chances[k] * chances_lost > 1e-4):
            low, high = tango_of(int(k), int(j), n)
            total += chances[k] * chances_lost[j] * (low - 1e-12 <= gained - lost <= high + 1e-12)
    return total


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_gaffke_has_at_least_its_nominal_coverage(n, share):
    """Four samples of prompts of varying difficulty, once more after a training that changed nothing."""
    random = np.random.default_rng(n)
    covered = []
    for _ in range(120):
        difficulty = random.beta(2 * share, 2 * (1 - share), n)
        before, after = random.binomial(4, difficulty, (2, n)) / 4
        mean, change = mean_interval(before, resamples=400), paired_difference(before, after, resamples=400)
        covered.append((mean.low <= share <= mean.high, change.low <= 0 <= change.high))
    assert np.mean(covered, axis=0).min() >= 0.93


def test_unpaired_difference_uses_newcombe():
    """Newcombe 1998, table II: 56 of 70 minus 48 of 80."""
    difference = unpaired_difference([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert (difference.mean, difference.n, difference.method) == (pytest.approx(0.2), 70, NEWCOMBE)
    assert (difference.low, difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_paired_difference_of_equal_values_is_about_zero():
    for values, method in [([0.0, 1.0, 1.0, 1.0], TANGO), ([0.0, 1.0, 0.25, 1.0], GAFFKE)]:
        difference = paired_difference(values, values)
        assert (difference.mean, difference.n, difference.method) == (0.0, 4, method)
        assert difference.low == pytest.approx(-difference.high, abs=0.02)
        assert difference.high > 0.4


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_paired_difference_is_never_certain(n):
    for before, after in itertools.product((0.0, 0.5, 1.0), repeat=2):
        difference = paired_difference([before] * n, [after] * n)
        assert difference.low - 1e-12 <= after - before <= difference.high + 1e-12
        assert difference.high - difference.low > 1 / (n + 1)


def test_pairing_removes_the_difficulty_of_prompts():
    random = np.random.default_rng(0)
    before = random.uniform(0, 2, 50)
    after = before + 0.1 + random.normal(0, 0.01, 50)
    difference = paired_difference(before.tolist(), after.tolist())
    assert 0.09 < difference.low < difference.mean < difference.high < 0.11
    reversed_difference = paired_difference(after.tolist(), before.tolist())
    assert reversed_difference.mean == pytest.approx(-difference.mean)


def test_draws_in_blocks_give_the_same_interval(monkeypatch):
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
