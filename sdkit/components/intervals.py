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
    random = np.random.default_rng(seed)
    block = max(1, DRAWS_AT_ONCE // each.size)
    sizes = [min(block, resamples - done) for done in range(0, resamples, block)]
    means = np.concatenate(
        [each[random.integers(0, each.size, (size, each.size))].mean(axis=1) for size in sizes]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
