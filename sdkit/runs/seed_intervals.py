"""Intervals that count prompts and seeds: of a mean over the runs of several seeds, and of the difference of two such means.

The score of prompt p in the run of seed s is `mean + prompt_p + seed_s + rest_ps`, both effects random.  The mean over all
of them has two sources of error.  The prompts' interval is that of `intervals` for the means over seeds; if every
score is 0 or 1, Wilson's for the effective number of trials.  The seeds' standard error comes from the analysis of variance
of the crossed table, with Student's t for as many degrees of freedom as there are seeds, less one.  The distances of the ends
from the mean are combined as the sides of a right triangle (Zou and Donner 2008, Statistics in Medicine 27, 1693-1702).
docs/decisions.md compares it with other intervals; tests/runs/test_coverage.py simulates how often it holds the true mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve

from sdkit.runs.intervals import Interval, combined, difference_of_changes, mean_interval, paired_difference

WILSON_CLUSTERED = "Wilson's interval for the effective number of trials"
OVER_SEEDS = "and Student's t over seeds"

BySeed = Mapping[int, Mapping[str, float]]
"""Seed → prompt → score."""
Ends = tuple[BySeed, BySeed]
"""A run's scores before and after training."""
SeedError = tuple[float, int]
"""A standard error that seeds cause, and its degrees of freedom."""


def mean_over_seeds(scores: BySeed) -> dict[str, float]:
    """Prompt → the mean over the seeds, for the prompts that all of them have."""
    prompts = [p for p in next(iter(scores.values())) if all(p in each for each in scores.values())]
    return {prompt: sum(each[prompt] for each in scores.values()) / len(scores) for prompt in prompts}


def seed_error(scores: BySeed) -> SeedError | None:
    """The standard error of the mean that is due to the seeds; None for a single seed."""
    if len(scores) < 2 or not mean_over_seeds(scores):
        return None
    return error_of_columns([(_table(scores), 1.0)])


def _table(scores: BySeed) -> np.ndarray:
    """The score of every prompt that all seeds have, under every seed.  [P, S]"""
    return np.array([[each[prompt] for each in scores.values()] for prompt in mean_over_seeds(scores)])


def error_of_columns(tables: Sequence[tuple[np.ndarray, float]]) -> SeedError:
    """The standard error, due to their columns, of a weighted sum of the means of crossed tables.

    Each table, with its weight, is [P, S]; all have the same columns.

    The part of the columns' mean square that chance explains is subtracted at its first quartile, not its mean: with 2 or 3
    columns the difference would be 0 too often.
    """
    from scipy.stats import f

    seeds = tables[0][0].shape[1]
    between = float(np.sum([weight * table.mean(axis=0) for table, weight in tables], axis=0).var(ddof=1))
    by_chance = 0.0
    for table, weight in tables:
        prompts = table.shape[0]
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        freedom = max(1, (prompts - 1) * (seeds - 1))
        mean_square = float((rest**2).sum()) / freedom
        by_chance += float(f.ppf(0.25, seeds - 1, freedom)) * mean_square / prompts * weight**2
    return math.sqrt(max(0.0, between - by_chance) / seeds), seeds - 1


def difference_errors(before: BySeed, after: BySeed) -> list[SeedError]:
    """The standard errors of the difference of two means that are due to the seeds, which are paired if they are the same."""
    if before.keys() == after.keys():
        changes = _paired(before, after)
        if any(changes.values()):
            return list(filter(None, [seed_error(changes)]))
    return list(filter(None, [seed_error(before), seed_error(after)]))


def _paired(before: BySeed, after: BySeed) -> BySeed:
    """The changes under each seed, of the prompts that both have under all seeds."""
    common = mean_over_seeds(before).keys() & mean_over_seeds(after).keys()
    return {
        seed: {p: after[seed][p] - value for p, value in prompts.items() if p in common}
        for seed, prompts in before.items()
    }


def widened(interval: Interval, errors: Sequence[SeedError], level: float = 0.95) -> Interval:
    """An interval over prompts, widened by errors that are due to the seeds."""
    from scipy.stats import t

    if not errors:
        return interval
    seeds = math.hypot(*(float(t.ppf((1 + level) / 2, freedom)) * error for error, freedom in errors))
    low = interval.mean - math.hypot(interval.mean - interval.low, seeds)
    high = interval.mean + math.hypot(interval.high - interval.mean, seeds)
    return evolve(interval, low=low, high=high, method=f"{interval.method} {OVER_SEEDS}")


def seeds_mean(scores: BySeed) -> Interval:
    """The mean over prompts and seeds, with its 95 % interval.  Raises ValueError if the seeds have no common prompt."""
    error = seed_error(scores)
    interval = _over_prompts(scores)
    return interval if error is None else _within_bounds(widened(interval, [error]), [scores])


def _over_prompts(scores: BySeed) -> Interval:
    """The mean over prompts and seeds, with an interval over prompts alone."""
    values = list(mean_over_seeds(scores).values())
    binary = all(value in (0.0, 1.0) for prompts in scores.values() for value in prompts.values())
    return clustered_wilson(values) if binary and len(scores) > 1 else mean_interval(values)


def _within_bounds(interval: Interval, scores: Sequence[BySeed]) -> Interval:
    """The interval, cut at 0 and 1 if all scores are between them."""
    singles = [value for by_seed in scores for prompts in by_seed.values() for value in prompts.values()]
    if min(singles) < 0 or max(singles) > 1:
        return interval
    return evolve(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def weighted_mean(parts: Sequence[tuple[BySeed, float]]) -> Interval:
    """The weighted mean of several suites' means over prompts and seeds, with its 95 % interval.

    Each part is the scores of a suite and its weight; the weights sum to 1, and all parts have the same seeds.
    """
    interval = combined([(_over_prompts(scores), weight) for scores, weight in parts])
    return _within_bounds(widened(interval, _weighted_errors(parts)), [scores for scores, _ in parts])


def weighted_change(parts: Sequence[tuple[BySeed, BySeed, float]]) -> Interval:
    """The weighted mean of several suites' changes, paired by prompt and seed, with its 95 % interval.

    Each part is the scores of a suite before and after, and its weight, as for `weighted_mean`.
    """
    interval = combined([(_change_over_prompts(before, after), weight) for before, after, weight in parts])
    return widened(interval, _weighted_errors([(_paired(before, after), weight) for before, after, weight in parts]))


def weighted_difference(parts: Sequence[tuple[Ends, Ends, float]]) -> Interval:
    """The change of a second run's weighted mean over suites minus that of a first, with its 95 % interval.

    Each part is a suite's scores of both runs, and its weight.  The runs have the same prompts; they are paired by seed if
    they have the same seeds.
    """
    interval = combined([(_difference_over_prompts(*first, *second), weight) for first, second, weight in parts])
    changes = [(_paired(*first), _paired(*second), weight) for first, second, weight in parts]
    if parts[0][0][0].keys() == parts[0][1][0].keys():
        return widened(interval, _weighted_errors([(_paired(a, b), weight) for a, b, weight in changes]))
    errors = _weighted_errors([(a, weight) for a, _, weight in changes])
    return widened(interval, [*errors, *_weighted_errors([(b, weight) for _, b, weight in changes])])


def _in_one_order(scores: Sequence[BySeed]) -> list[list[float]]:
    """The means over seeds of several scores of the same prompts, in the order of the first.  Raises ValueError if they differ."""
    means = [mean_over_seeds(each) for each in scores]
    if any(each.keys() != means[0].keys() for each in means):
        raise ValueError("the prompts differ")
    return [[each[prompt] for prompt in means[0]] for each in means]


def _weighted_errors(parts: Sequence[tuple[BySeed, float]]) -> list[SeedError]:
    """The standard error of a weighted sum of means that is due to the seeds; none for a single seed."""
    if len(parts[0][0]) < 2:
        return []
    return [error_of_columns([(_table(scores), weight) for scores, weight in parts])]


def clustered_wilson(shares: Sequence[float], weights: Sequence[float] = (), *, level: float = 0.95) -> Interval:
    """The mean of shares of successes, one for each prompt, with Wilson's interval for as many independent trials as would
    give the mean the same variance.

    weights: of the prompts, such as their numbers of trials; none: equal ones.  If the shares do not differ, the number of trials is that of the prompts.  Source: Dean and Pagano 2015, Journal of
    Survey Statistics and Methodology 3, 484-503.
    """
    from scipy.stats import norm

    values = np.asarray(shares, dtype=float)
    relative = (
        np.asarray(weights, dtype=float) / sum(weights) if len(weights) else np.full(values.size, 1 / values.size)
    )
    mean = float(relative @ values)
    squares = float(relative**2 @ (values - mean) ** 2)
    variance = squares * values.size / (values.size - 1) if np.ptp(values) else 0.0
    trials = mean * (1 - mean) / variance if variance > 0 else float(values.size)
    square = float(norm.ppf((1 + level) / 2)) ** 2
    centre = (mean + square / (2 * trials)) / (1 + square / trials)
    half = math.sqrt(square * (mean * (1 - mean) / trials + square / (4 * trials**2))) / (1 + square / trials)
    return Interval(mean=mean, low=centre - half, high=centre + half, n=values.size, method=WILSON_CLUSTERED)


def seeds_change(before: BySeed, after: BySeed) -> Interval:
    """The mean of after − before over prompts and seeds, paired by both, with its 95 % interval.

    Raises ValueError if the prompts differ.
    """
    return widened(_change_over_prompts(before, after), difference_errors(before, after))


def _change_over_prompts(before: BySeed, after: BySeed) -> Interval:
    """The mean of after − before, with an interval over prompts alone.  Raises ValueError if the prompts differ."""
    first, last = _in_one_order([before, after])
    return paired_difference(first, last)


def _difference_over_prompts(*scores: BySeed) -> Interval:
    """The change of two scores minus that of two others, with an interval over prompts alone."""
    before, after, other_before, other_after = _in_one_order(scores)
    return difference_of_changes(before, after, other_before, other_after)
