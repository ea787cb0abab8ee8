"""How often the interval over prompts and seeds holds the true mean, in simulated experiments."""

import math

import numpy as np
import pytest

from sdkit.runs.seed_intervals import seeds_mean

PROMPTS = 60


def by_seed(table):
    """The scores of prompts (rows) and seeds (columns) as they are read from runs."""
    return {seed: {str(i): float(x) for i, x in enumerate(column)} for seed, column in enumerate(table.T)}


def measured(rng, seeds, ratio, rest=0.5):
    """A table of scores without bounds; the variance of its mean due to seeds is `ratio` times that due to all else."""
    prompt = 1 - rest
    seed = ratio * seeds * (prompt / PROMPTS + rest / (PROMPTS * seeds))
    sizes = ((PROMPTS, 1), (1, seeds), (PROMPTS, seeds))
    return sum(rng.normal(0, math.sqrt(v), size) for v, size in zip((prompt, seed, rest), sizes, strict=True))


def binary(rng, seeds, spread):
    """A table of scores of 0 or 1: each prompt has a probability, and each seed adds to all of them."""
    centre = rng.beta(2, 2, (PROMPTS, 1)) * 0.6 + 0.2
    shift = rng.uniform(-spread, spread, (1, seeds)) * math.sqrt(3)
    return (rng.random((PROMPTS, seeds)) < centre + shift).astype(float)


def coverage(draw, mean, experiments=1000, interval=seeds_mean):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(experiments):
        result = interval(by_seed(draw(rng)))
        held += result.low <= mean <= result.high
    return held / experiments


@pytest.mark.parametrize(("seeds", "ratio"), [(2, 0.3), (3, 0.0), (3, 1.0), (5, 0.3), (5, 3.0)])
def test_intervals_cover_means_of_scores_without_bounds(seeds, ratio):
    assert 0.93 <= coverage(lambda rng: measured(rng, seeds, ratio), 0.0) <= 0.97
