"""Masks and weights of tokens: golden figures, loops in plain floats, and the edges."""

import math

import pytest
import torch
from torch.testing import assert_close

from sdkit.losses.token_weights import drift, entropy_weight, pass_rate_variance, perplexity, sigmoid_ramp, top_share


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def long(*values):
    return torch.tensor(values, dtype=torch.long)


def test_position_golden():
    weights = sigmoid_ramp(f64(0.1, 0.3, 0.6, 1.0), smallest=0.25, middle=0.30, width=0.10)
    assert_close(weights, f64(0.339402, 0.625, 0.964431, 0.999317), atol=1e-6, rtol=0)


def test_teacher_entropy_golden():
    weights = entropy_weight(f64(0.1, 1.0, 2.0), rate=1.0)
    assert_close(weights, f64(1.927849, 0.783805, 0.288346), atol=1e-6, rtol=0)


def test_drift_golden():
    weights = drift(f64(-0.1, -2.0, 0.5, -0.4), long(0, 0, 0, 0), rows=1, strength=0.5)
    assert_close(weights, f64(1.5, 1.483333, 1.15, 1.066667), atol=1e-6, rtol=0)


def test_pass_rate_variance_by_hand():
    assert_close(pass_rate_variance(f64(0.0, 0.25, 0.5, 1.0), 0.5), f64(0, math.sqrt(3) / 4, 0.5, 0))
    assert_close(pass_rate_variance(f64(0.25), 1.0), f64(0.1875))


def test_perplexity_by_hand():
    # Mean log-probabilities −1, −3 (log 2 apart twice over) and, in a group of its own, −7.
    logprobs = f64(-1 * math.log(2), -3 * math.log(2), -2 * math.log(2), -7.0)
    row = long(0, 1, 1, 2)
    # Perplexities 2, 2^2.5 and whatever.
    first, second = 2.0, 2**2.5
    mean = (first + second) / 2
    expected = f64(first / mean, second / mean, second / mean, 1.0)
    assert_close(perplexity(logprobs, row, long(5, 5, 9), 1.0), expected)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(10, 0.2, 2), (7, 0.2, 2), (30, 0.1, 3), (1, 0.01, 1), (5, 1.0, 5), (0, 0.5, 0), (3, 1 / 3, 1)],
)
def test_top_share_selects_an_exact_number_of_tokens(count, share, expected):
    draw = torch.Generator().manual_seed(count)
    values = torch.rand(count, generator=draw)
    chosen = top_share(values, share)
    assert chosen.sum() == expected
    if 0 < expected < count:
        assert values[chosen].min() > values[~chosen].max()


def test_top_share_prefers_the_first_of_equal_values():
    assert top_share(f64(1, 2, 1, 2, 2), 0.4).tolist() == [False, True, False, True, False]
    assert top_share(f64(3, 3, 3), 0.3).tolist() == [True, False, False]


LENGTHS = [3, 0, 1, 4]
row_of_token = long(*(i for i, n in enumerate(LENGTHS) for _ in range(n)))


@pytest.fixture
def values():
    draw = torch.Generator().manual_seed(5)
    return torch.randn(sum(LENGTHS), generator=draw, dtype=torch.float64)


def by_row(values):
    return [values[row_of_token == i].tolist() for i in range(len(LENGTHS))]


def test_drift_matches_a_loop_over_each_sequence(values):
    expected = []
    for gaps in by_row(values):
        for t in range(len(gaps)):
            share = sum(map(abs, gaps[:t])) / sum(map(abs, gaps))
            expected.append(1 + 0.7 * (1 - share))
    assert_close(drift(values, row_of_token, len(LENGTHS), 0.7), f64(*expected))


@pytest.mark.parametrize("power", [1.0, -2.0, 0.0])
def test_perplexity_matches_a_loop_over_each_group(values, power):
    groups = [4, 4, 4, 1]
    powers = [math.exp(-sum(x) / len(x)) ** power if x else None for x in by_row(values)]
    expected = []
    for i, tokens in enumerate(by_row(values)):
        peers = [w for w, g in zip(powers, groups, strict=True) if g == groups[i] and w is not None]
        expected += [powers[i] / (sum(peers) / len(peers)) for _ in tokens]
    assert_close(perplexity(values, row_of_token, long(*groups), power), f64(*expected))


def test_weights_divided_by_a_mean_have_mean_one(values):
    assert entropy_weight(values.abs(), 2.0).mean() == pytest.approx(1)
    weights = perplexity(values, row_of_token, long(0, 0, 0, 0), 1.0)
    row_weights = [weights[row_of_token == i][0].item() for i in (0, 2, 3)]
    assert sum(row_weights) / 3 == pytest.approx(1)


def test_no_tokens_give_no_weights():
    none, no_rows = f64(), long()
    assert entropy_weight(none, 1.0).shape == (0,)
    assert drift(none, no_rows, 2, 0.5).shape == (0,)
    assert drift(none, no_rows, 0, 0.5).shape == (0,)
    assert perplexity(none, no_rows, long(3, 3), 1.0).shape == (0,)
    assert perplexity(none, no_rows, no_rows, 1.0).shape == (0,)
    assert top_share(none, 0.2).shape == (0,)


def test_large_numbers_stay_finite():
    assert_close(entropy_weight(f64(1e4, 2e4), 10.0), f64(2.0, 0.0))
    weights = perplexity(f64(-1e4, -2e4), long(0, 1), long(0, 0), -1.0)
    assert_close(weights, f64(2.0, 0.0))


def test_drift_without_gaps_gives_equal_weights():
    assert drift(f64(0, 0, 1), long(0, 0, 1), 2, 0.5).tolist() == [1.5, 1.5, 1.5]


def test_weights_change_no_input(values):
    before = values.clone()
    entropy_weight(values, 1.0), drift(values, row_of_token, 4, 1.0), top_share(values, 0.5)
    perplexity(values, row_of_token, long(0, 0, 1, 1), 1.0)
    assert torch.equal(values, before)
