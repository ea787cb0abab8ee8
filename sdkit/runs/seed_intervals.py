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

from sdkit.runs.intervals import Interval, mean_interval, paired_difference

WILSON_CLUSTERED = "Wilson's interval for the effective number of trials"
OVER_SEEDS = "and Student's t over seeds"

BySeed = Mapping[int, Mapping[str, float]]
"""Seed → prompt → score."""
SeedError = tuple[float, int]
"""A standard error that seeds cause, and its degrees of freedom."""


def mean_over_seeds(scores: BySeed) -> dict[str, float]:
    """Prompt → the mean over the seeds, for the prompts that all of them have."""
    prompts = [p for p in next(iter(scores.values())) if all(p in each for each in scores.values())]
    return {prompt: sum(each[prompt] for each in scores.values()) / len(scores) for prompt in prompts}


def seed_error(scores: BySeed) -> SeedError | None:
    """The standard error of the mean that is due to the seeds; None for a single seed."""
    prompts = list(mean_over_seeds(scores))
    if len(scores) < 2 or not prompts:
        return None
    return error_of_columns(np.array([[each[prompt] for each in scores.values()] for prompt in prompts]))


def error_of_columns(*tables: np.ndarray) -> SeedError:
    """The standard error, due to their columns, of the mean of the means of crossed tables with the same columns.  [P, S] each

    The part of the columns' mean square that chance explains is subtracted at its median, not its mean: with 2 columns the
    difference of means would be 0 too often.
    """
    from scipy.stats import f

    seeds = tables[0].shape[1]
    between = float(np.mean([table.mean(axis=0) for table in tables], axis=0).var(ddof=1))
    by_chance = 0.0
    for table in tables:
        prompts = table.shape[0]
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        freedom = max(1, (prompts - 1) * (seeds - 1))
        mean_square = float((rest**2).sum()) / freedom
        by_chance += float(f.ppf(0.5, seeds - 1, freedom)) * mean_square / prompts / len(tables) ** 2
    return math.sqrt(max(0.0, between - by_chance) / seeds), seeds - 1


def difference_errors(before: BySeed, after: BySeed) -> list[SeedError]:
    """The standard errors of the difference of two means that are due to the seeds, which are paired if they are the same."""
    if before.keys() == after.keys():
        common = set(mean_over_seeds(before)) & set(mean_over_seeds(after))
        changes = {
            seed: {p: after[seed][p] - value for p, value in before[seed].items() if p in common} for seed in before
        }
        if common:
            return list(filter(None, [seed_error(changes)]))
    return list(filter(None, [seed_error(before), seed_error(after)]))


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
    values = list(mean_over_seeds(scores).values())
    error = seed_error(scores)
    if error is None:
        return mean_interval(values)
    singles = [value for prompts in scores.values() for value in prompts.values()]
    binary = all(value in (0.0, 1.0) for value in singles)
    interval = widened(clustered_wilson(values) if binary else mean_interval(values), [error])
    if min(singles) < 0 or max(singles) > 1:
        return interval
    return evolve(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def clustered_wilson(shares: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of shares of successes, one for each prompt, with Wilson's interval for as many independent trials as would
    give the mean the same variance.

    If the shares do not differ, the number of trials is that of the prompts.  Source: Dean and Pagano 2015, Journal of
    Survey Statistics and Methodology 3, 484-503.
    """
    from scipy.stats import norm

    values = np.asarray(shares, dtype=float)
    mean, variance = float(values.mean()), float(values.var(ddof=1)) / values.size if values.size > 1 else 0.0
    trials = mean * (1 - mean) / variance if variance > 0 else float(values.size)
    square = float(norm.ppf((1 + level) / 2)) ** 2
    centre = (mean + square / (2 * trials)) / (1 + square / trials)
    half = math.sqrt(square * (mean * (1 - mean) / trials + square / (4 * trials**2))) / (1 + square / trials)
    return Interval(mean=mean, low=centre - half, high=centre + half, n=values.size, method=WILSON_CLUSTERED)


def seeds_change(before: BySeed, after: BySeed) -> Interval:
    """The mean of after − before over prompts and seeds, paired by both, with its 95 % interval.

    Raises ValueError if the prompts differ.
    """
    first, last = mean_over_seeds(before), mean_over_seeds(after)
    if first.keys() != last.keys():
        raise ValueError("the prompts differ")
    interval = paired_difference([first[prompt] for prompt in last], list(last.values()))
    return widened(interval, difference_errors(before, after))
