"""Confidence intervals and permutation tests for means over prompts.  Knows numbers; knows nothing of models or rewards.

No interval has zero width: that few prompts agree does not make a mean certain.

| scores | their mean | their paired change |
|---|---|---|
| all 0 or 1 | Wilson's score interval | Tango's score interval |
| from 0 to 1 | Gaffke's interval | Gaffke's interval |
| any other | Student's t interval | Student's t interval |

The difference of means over different prompts has Newcombe's hybrid interval, and a weighted mean over suites Zou and
Donner's; both are made from the means' own intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from attrs import frozen

DRAWS_AT_ONCE = 4_000_000  # most random numbers that Gaffke's interval holds at one time
WILSON = "Wilson's score interval"
TANGO = "Tango's score interval"
GAFFKE = "Gaffke's interval"
STUDENT = "Student's t interval"
NEWCOMBE = "Newcombe's hybrid interval"
MOVER = "Zou and Donner's interval of a weighted mean"


@frozen(kw_only=True)
class Interval:
    """A mean over n prompts and the interval around it; the ends are infinite where the prompts cannot limit the mean."""

    mean: float
    low: float
    high: float
    n: int
    method: str | None = None  # by name; None in a run directory, which does not store it


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


def tango(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of the change of a proportion: of n pairs, `gained` went from 0 to 1 and `lost` from 1 to 0.

    Source: Tango 1998, Statistics in Medicine 17, 891-908.  Raises ValueError if n is 0 or the counts exceed it.
    """
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(f"{gained} gained and {lost} lost of {n}")
    return -_tango_upper(lost, gained, n, level), _tango_upper(gained, lost, n, level)


def mean_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95, bounded: bool = True
) -> Interval:
    """The mean over prompts, with an interval.

    One value per prompt: several samples of a prompt are not independent.  `bounded` says that values which are all from 0
    to 1 cannot be others; without it, the interval is always Student's.  Raises ValueError if there are no values.
    """
    scores = _values(values)
    if not bounded:
        ends, method = _student(scores, level), STUDENT
    elif _all_binary(scores):
        ends, method = wilson(int(scores.sum()), scores.size, level), WILSON
    elif _all_bounded(scores):
        ends, method = _gaffke(scores, (0.0, 1.0), seed, resamples, level), GAFFKE
    else:
        ends, method = _student(scores, level), STUDENT
    return Interval(mean=float(scores.mean()), low=ends[0], high=ends[1], n=scores.size, method=method)


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    *,
    level: float = 0.95,
    bounded: bool = True,
) -> Interval:
    """The mean of after − before, one value per prompt, with an interval; `bounded` as for `mean_interval`.

    Raises ValueError if there are no prompts or the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    both = _values([*before, *after])
    changes = both[len(before) :] - both[: len(before)]
    if not bounded:
        ends, method = _student(changes, level), STUDENT
    elif _all_binary(both):
        gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
        ends, method = tango(gained, lost, changes.size, level), TANGO
    elif _all_bounded(both):
        ends, method = _gaffke(changes, (-1.0, 1.0), seed, resamples, level), GAFFKE
    else:
        ends, method = _student(changes, level), STUDENT
    return Interval(mean=float(changes.mean()), low=ends[0], high=ends[1], n=changes.size, method=method)


def difference_of_changes(
    before: Sequence[float],
    after: Sequence[float],
    other_before: Sequence[float],
    other_after: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean of (other_after − other_before) − (after − before), one value of each per prompt, with an interval.

    Raises ValueError if there are no prompts or the lengths differ.
    """
    scores = [_values(values) for values in (before, after, other_before, other_after)]
    if len({values.size for values in scores}) > 1:
        raise ValueError(f"{', '.join(str(values.size) for values in scores)} values")
    changes = (scores[3] - scores[2]) - (scores[1] - scores[0])
    if all(_all_bounded(values) for values in scores):
        ends, method = _gaffke(changes, (-2.0, 2.0), seed, resamples, level), GAFFKE
    else:
        ends, method = _student(changes, level), STUDENT
    return Interval(mean=float(changes.mean()), low=ends[0], high=ends[1], n=changes.size, method=method)


def unpaired_difference(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000, *, level: float = 0.95
) -> Interval:
    """The mean of `after` minus the mean of `before`, which have different prompts; combines the two means' intervals.

    `n` is the size of the smaller side.  Sources: for scores of 0 or 1 method 10 of Newcombe 1998, Statistics in Medicine
    17, 873-890; for others the same with their intervals, Zou and Donner 2008, Statistics in Medicine 27, 1693-1702.
    Raises ValueError if a side is empty.
    """
    a, b = (mean_interval(values, seed=seed, resamples=resamples, level=level) for values in (before, after))
    mean = b.mean - a.mean
    low = mean - math.hypot(b.mean - b.low, a.high - a.mean)
    high = mean + math.hypot(b.high - b.mean, a.mean - a.low)
    return Interval(mean=mean, low=low, high=high, n=min(a.n, b.n), method=NEWCOMBE)


def combined(parts: Sequence[tuple[Interval, float]]) -> Interval:
    """The weighted sum of means over different prompts, from their own intervals at the same level; n is their total.

    Each part is an interval and its weight, which is above 0.  Source: Zou and Donner 2008, Statistics in Medicine 27,
    1693-1702 (method of variance estimates recovery).  Raises ValueError if there are no parts.
    """
    if not parts:
        raise ValueError("no intervals")
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]  # unrounded
    mean = sum(weight * interval.mean for interval, weight in parts)
    low = math.hypot(*(weight * (interval.mean - interval.low) for interval, weight in parts))
    high = math.hypot(*(weight * (interval.high - interval.mean) for interval, weight in parts))
    method = parts[0][0].method if len(parts) == 1 else MOVER
    n = sum(interval.n for interval, _ in parts)
    return Interval(mean=mean, low=mean - low, high=mean + high, n=n, method=method)


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


def _all_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _all_bounded(scores: np.ndarray) -> bool:
    return bool(((scores >= 0) & (scores <= 1)).all())


def _tango_upper(gained: int, lost: int, n: int, level: float) -> float:
    """The largest change that a score test at this level does not reject, by bisection."""
    from scipy.stats import norm

    critical = float(norm.ppf((1 + level) / 2)) ** 2

    def rejected(change: float) -> bool:
        """Whether the squared score statistic exceeds its critical value; `q` is the most likely share lost, given `change`."""
        b = (2 * n - gained + lost) * change - gained - lost
        q = (math.sqrt(b * b + 8 * n * lost * change * (1 - change)) - b) / (4 * n)
        return (gained - lost - n * change) ** 2 > critical * n * (2 * q + change * (1 - change))

    low, high = (gained - lost) / n, 1.0
    if not rejected(high):
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _gaffke(
    values: np.ndarray, bounds: tuple[float, float], seed: int, resamples: int, level: float
) -> tuple[float, float]:
    """Gaffke's interval of the mean of values that lie within `bounds`.

    A Bayesian bootstrap with one more value, at the bound: with 0 and 1 it is Clopper and Pearson's interval.  Source:
    Learned-Miller and Thomas 2019 (arXiv 1905.06208), who conjecture that it covers at least as often as it says.
    """
    rng, rows = np.random.default_rng(seed), max(1, DRAWS_AT_ONCE // (values.size + 1))
    lowest, highest = (np.append(values, bound) for bound in bounds)
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, resamples, rows):
        weights = rng.standard_exponential((min(rows, resamples - start), values.size + 1))
        totals = weights.sum(axis=1)
        ends.append((weights @ lowest / totals, weights @ highest / totals))
    low, high = (np.concatenate(side) for side in zip(*ends, strict=True))
    return float(np.quantile(low, (1 - level) / 2)), float(np.quantile(high, (1 + level) / 2))


def _student(values: np.ndarray, level: float) -> tuple[float, float]:
    """Student's t interval of the mean; infinite if the values are all the same, since nothing else limits them."""
    from scipy.stats import t

    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    if spread == 0:
        return -math.inf, math.inf
    half = float(t.ppf((1 + level) / 2, values.size - 1)) * spread / math.sqrt(values.size)
    return float(values.mean()) - half, float(values.mean()) + half
