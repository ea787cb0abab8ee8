"""Confidence intervals and permutation tests for means over prompts.  Knows numbers; knows nothing of models or rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

DRAWS_AT_ONCE = 4_000_000  # most indices that the bootstrap draws at one time


@frozen(kw_only=True)
class Interval:
    """A mean over n prompts and the interval around it."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) for n = 0.

    Raises ValueError if `successes` is not within 0 .. n.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n:  # scipy 1.18 no longer says so
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean over prompts with Wilson's interval if every prompt scored 0 or 1, else with a percentile bootstrap.

    One value per prompt: several samples of a prompt are not independent.  Raises ValueError if there are no values.
    """
    scores = _values(values)
    if not np.isin(scores, (0.0, 1.0)).all():
        return _bootstrap([scores], seed, resamples, level)
    low, high = wilson(int(scores.sum()), scores.size, level)
    return Interval(mean=float(scores.mean()), low=low, high=high, n=scores.size)


def paired_difference(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000, *, level: float = 0.95
) -> Interval:
    """The mean of after − before, one value per prompt, with a percentile bootstrap over prompts.

    Raises ValueError if there are no prompts or the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    return _bootstrap([_values(after) - _values(before)], seed, resamples, level)


def unpaired_difference(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000, *, level: float = 0.95
) -> Interval:
    """The mean of `after` minus the mean of `before`, which have different prompts: each side is resampled by itself.

    `n` is the size of the smaller side.  Raises ValueError if a side is empty.
    """
    return _bootstrap([_values(after), _values(before)], seed, resamples, level)


def paired_p_value(before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000) -> float:
    """The p-value of a two-sided sign-flip test: how often differences of random sign have a mean as far from 0.

    At least about 2^(1 − d) if d prompts differ, so a handful of prompts is never significant.
    """
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    # The sum depends only on how many changes of each size are positive.
    sizes, counts = np.unique(np.abs(changes[changes != 0]), return_counts=True)
    positive = np.random.default_rng(seed).binomial(counts, 0.5, (resamples, counts.size))
    return _p_value((2 * positive - counts) @ sizes, changes.sum())


def unpaired_p_value(before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000) -> float:
    """The p-value of a two-sided permutation test: how often a random split of the prompts has means as far apart."""
    sides = [np.asarray(values, dtype=float) for values in (before, after)]
    values, counts = np.unique(np.concatenate(sides), return_counts=True)
    total, size = values @ counts, len(after)
    splits = np.random.default_rng(seed).multivariate_hypergeometric(counts, size, resamples, method="marginals")
    sums = splits @ values
    means = sums / size - (total - sums) / len(before)
    return _p_value(means, sides[1].mean() - sides[0].mean())


def _p_value(draws: np.ndarray, observed: float) -> float:
    """The share of draws at least as far from 0 as the observed value, which counts as one of them."""
    return float(1 + (np.abs(draws) >= abs(observed) - 1e-12).sum()) / (1 + draws.size)


def _values(values: Sequence[float]) -> np.ndarray:
    """Returns the values as an array.  Raises ValueError if there are none."""
    if not len(values):
        raise ValueError("no values")
    return np.asarray(values, dtype=float)


def _bootstrap(sides: Sequence[np.ndarray], seed: int, resamples: int, level: float) -> Interval:
    """A side's mean, or the first side's mean minus the second's, with its percentile interval."""
    from scipy import stats

    def statistic(first: np.ndarray, *second: np.ndarray, axis: int) -> np.ndarray:
        return first.mean(axis) - sum(side.mean(axis) for side in second)

    sizes = [side.size for side in sides]
    interval = stats.bootstrap(
        [np.resize(side, max(side.size, 2)) for side in sides],  # scipy refuses a single value
        statistic,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // sum(sizes)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    mean = float(statistic(*sides, axis=0))
    return Interval(mean=mean, low=float(interval.low), high=float(interval.high), n=min(sizes))
