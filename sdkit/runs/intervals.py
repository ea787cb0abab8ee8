"""How sure a mean is: intervals over prompts.  Knows numbers; knows nothing of models, suites or rewards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from attrs import frozen

DRAWS_AT_ONCE = 4_000_000  # indices held in memory by the bootstrap


@frozen(kw_only=True)
class Interval:
    """A mean over n prompts and the interval around it."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; of nothing at all, (0, 1).

    Raises ValueError where `successes` is not within 0 .. n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, scale = successes / n, 1 + z * z / n
    centre = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends rounding can leave the interval a hair off the share that it must hold.
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
    """The mean over prompts: Wilson's interval where every prompt scored 0 or 1, else a percentile bootstrap.

    `groups` names the prompt of each value, where a prompt has several: samples of one prompt are not independent,
    so a prompt counts once, with its mean.  Raises ValueError where there are no values or the lengths differ.
    """
    each = _per_group(values, groups)
    mean, n = float(each.mean()), each.size
    if np.isin(each, (0.0, 1.0)).all():
        low, high = wilson(int(each.sum()), n, level)
    else:
        low, high = _bootstrap(each, seed, resamples, level)
    return Interval(mean=mean, low=low, high=high, n=n)


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    *,
    level: float = 0.95,
) -> Interval:
    """The mean of after − before over prompts, one value per prompt each, with a percentile bootstrap over prompts.

    Raises ValueError where there are no prompts or the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    each = _filled(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))
    low, high = _bootstrap(each, seed, resamples, level)
    return Interval(mean=float(each.mean()), low=low, high=high, n=each.size)


def unpaired_difference(
    before: Sequence[float],
    after: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    *,
    level: float = 0.95,
) -> Interval:
    """The mean of `after` minus the mean of `before`, which are of different prompts: each side is drawn by itself.

    `n` is the smaller side's.  Raises ValueError where a side is empty.
    """
    sides = [_filled(np.asarray(values, dtype=float)) for values in (before, after)]
    means = [_means(each, seed + i, resamples) for i, each in enumerate(sides)]
    low, high = _quantiles(means[1] - means[0], level)
    return Interval(
        mean=float(sides[1].mean() - sides[0].mean()),
        low=low,
        high=high,
        n=min(each.size for each in sides),
    )


def chance_of_paired(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> float:
    """How often differences of random sign have a mean as far from 0 (sign-flip test, two-sided).

    About 2^(1 − d) at the least where d prompts differ: a handful of prompts cannot tell anything.
    """
    each = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    # Only how many of each size point upwards matters.
    sizes, counts = np.unique(np.abs(each[each != 0]), return_counts=True)
    upwards = np.random.default_rng(seed).binomial(counts, 0.5, (resamples, counts.size))
    return _as_far((2 * upwards - counts) @ sizes, each.sum())


def chance_of_unpaired(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> float:
    """How often the prompts, dealt anew into two sides, have means as far apart (permutation test, two-sided)."""
    sides = [np.asarray(values, dtype=float) for values in (before, after)]
    values, counts = np.unique(np.concatenate(sides), return_counts=True)
    whole, size = values @ counts, len(after)
    dealt = np.random.default_rng(seed).multivariate_hypergeometric(
        counts, size, resamples, method="marginals"
    )
    sums = dealt @ values
    means = sums / size - (whole - sums) / len(before)
    return _as_far(means, sides[1].mean() - sides[0].mean())


def _as_far(draws: np.ndarray, found: float) -> float:
    """The share of draws at least as far from 0 as what was found, which is itself one of them."""
    return float(1 + (np.abs(draws) >= abs(found) - 1e-12).sum()) / (1 + draws.size)


def _per_group(values: Sequence[float], groups: Sequence[Hashable] | None) -> np.ndarray:
    each = _filled(np.asarray(values, dtype=float))
    if groups is None:
        return each
    if len(groups) != each.size:
        raise ValueError(f"{each.size} values in {len(groups)} groups")
    numbers: dict[Hashable, int] = {}
    owner = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(owner, weights=each) / np.bincount(owner)


def _filled(each: np.ndarray) -> np.ndarray:
    if each.size == 0:
        raise ValueError("no values")
    return each


def _bootstrap(each: np.ndarray, seed: int, resamples: int, level: float) -> tuple[float, float]:
    return _quantiles(_means(each, seed, resamples), level)


def _means(each: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of the values drawn with replacement, [resamples]."""
    random = np.random.default_rng(seed)
    return np.concatenate(
        [
            each[random.integers(0, each.size, (size, each.size))].mean(axis=1)
            for size in _blocks(each.size, resamples)
        ]
    )


def _blocks(values: int, resamples: int) -> list[int]:
    """How many resamples are drawn at once, until all are."""
    block = max(1, DRAWS_AT_ONCE // values)
    return [min(block, resamples - done) for done in range(0, resamples, block)]


def _quantiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
