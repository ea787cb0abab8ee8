"""Confidence intervals and permutation tests for means over prompts.  Knows numbers; knows nothing of models or rewards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import NormalDist

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


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) for n = 0.

    Raises ValueError if `successes` is not within 0 .. n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    proportion, scale = successes / n, 1 + z * z / n
    centre = proportion + z * z / (2 * n)
    half = z * (proportion * (1 - proportion) / n + z * z / (4 * n * n)) ** 0.5
    # At 0 and n rounding could leave the proportion just outside the interval.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mean_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean over prompts with Wilson's interval if every prompt scored 0 or 1, else with a percentile bootstrap.

    `groups` names the prompt of each value if prompts have several: samples of one prompt are not independent, so each
    prompt counts once, with its mean.  Raises ValueError if there are no values or the lengths differ.
    """
    scores = _group_means(values, groups)
    mean, n = float(scores.mean()), scores.size
    if np.isin(scores, (0.0, 1.0)).all():
        low, high = wilson(int(scores.sum()), n, level)
    else:
        low, high = _bootstrap(scores, seed, resamples, level)
    return Interval(mean=mean, low=low, high=high, n=n)


def paired_difference(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000, *, level: float = 0.95
) -> Interval:
    """The mean of after − before, one value per prompt, with a percentile bootstrap over prompts.

    Raises ValueError if there are no prompts or the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    changes = _non_empty(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))
    low, high = _bootstrap(changes, seed, resamples, level)
    return Interval(mean=float(changes.mean()), low=low, high=high, n=changes.size)


def unpaired_difference(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000, *, level: float = 0.95
) -> Interval:
    """The mean of `after` minus the mean of `before`, which have different prompts: each side is resampled by itself.

    `n` is the size of the smaller side.  Raises ValueError if a side is empty.
    """
    sides = [_non_empty(np.asarray(values, dtype=float)) for values in (before, after)]
    means = [_bootstrap_means(side, seed + i, resamples) for i, side in enumerate(sides)]
    low, high = _quantiles(means[1] - means[0], level)
    return Interval(
        mean=float(sides[1].mean() - sides[0].mean()), low=low, high=high, n=min(side.size for side in sides)
    )


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


def _group_means(values: Sequence[float], groups: Sequence[Hashable] | None) -> np.ndarray:
    scores = _non_empty(np.asarray(values, dtype=float))
    if groups is None:
        return scores
    if len(groups) != scores.size:
        raise ValueError(f"{scores.size} values in {len(groups)} groups")
    numbers: dict[Hashable, int] = {}
    group_of = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(group_of, weights=scores) / np.bincount(group_of)


def _non_empty(values: np.ndarray) -> np.ndarray:
    if values.size == 0:
        raise ValueError("no values")
    return values


def _bootstrap(values: np.ndarray, seed: int, resamples: int, level: float) -> tuple[float, float]:
    return _quantiles(_bootstrap_means(values, seed, resamples), level)


def _bootstrap_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of the values resampled with replacement, [resamples]."""
    random = np.random.default_rng(seed)
    return np.concatenate(
        [
            values[random.integers(0, values.size, (size, values.size))].mean(axis=1)
            for size in _block_sizes(values.size, resamples)
        ]
    )


def _block_sizes(values: int, resamples: int) -> list[int]:
    """The numbers of resamples that are drawn at one time, to limit memory."""
    block = max(1, DRAWS_AT_ONCE // values)
    return [min(block, resamples - done) for done in range(0, resamples, block)]


def _quantiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
