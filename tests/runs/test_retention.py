"""New skill against retention: which suites make up a figure, its interval, and what that covers."""

import numpy as np
import pytest

from sdkit.runs import retention
from sdkit.runs.evaluations import EvaluationResult
from sdkit.runs.intervals import MOVER, TANGO, Interval, combined, mean_interval, paired_difference


def evaluation(scores, panel):
    """An evaluation with these scores by suite, of which `panel` belong to an entry each."""
    records = [{"suite": suite, **({"panel": panel[suite]} if suite in panel else {})} for suite in scores]
    keyed = {(suite, "greedy", "right"): values for suite, values in scores.items()}
    return EvaluationResult(scores=keyed, records=records, tokens=0)


PANEL = {"logic": "reasoning", "sums": "reasoning", "form": "instructions"}
BEFORE = evaluation({"skill": (0.0, 0.0), "logic": (1.0, 1.0), "sums": (1.0, 0.0), "form": (1.0, 1.0)}, PANEL)
AFTER = evaluation({"skill": (1.0, 1.0), "logic": (0.0, 0.0), "sums": (1.0, 0.0), "form": (1.0, 1.0)}, PANEL)


def test_entries_of_the_panel_weigh_the_same_whatever_their_number_of_suites():
    figures = retention.figures(BEFORE)
    assert list(figures) == ["new skill", "retention", "reasoning", "instructions"]
    weights = {key[0]: weight for key, weight in figures["retention"].items()}
    assert weights == {"logic": 0.25, "sums": 0.25, "form": 0.5}
    changes = {name: change["change"].mean for name, change in retention.changes(BEFORE, AFTER).items()}
    assert changes == {"new skill": 1.0, "retention": -0.25, "reasoning": -0.5, "instructions": 0.0}


def test_a_suite_counts_with_its_first_decoding_and_reward():
    several = {("skill", d, r): (value, value) for d, r, value in [("a", "x", 1.0), ("a", "y", 0.0), ("b", "x", 0.0)]}
    result = EvaluationResult(
        scores=several | {("form", "greedy", "x"): (0.5, 0.5)},
        records=[{"suite": "skill"}, {"suite": "form", "panel": "form"}],
        tokens=0,
    )
    assert retention.metrics(result)["eval/new_skill"] == 1.0
    assert retention.means(result) == {"form": 0.5}


def test_nothing_is_reported_without_a_panel_or_of_half_an_evaluation():
    alone = evaluation({"skill": (0.0, 1.0)}, {})
    assert retention.figures(alone) == retention.metrics(alone) == retention.changes(alone, alone) == {}
    assert retention.changes(BEFORE, evaluation({"skill": (1.0, 1.0)}, {})) == {}


def test_verdict_needs_an_interval_beside_zero():
    ends = {"gained": (0.1, 0.3), "lost": (-0.3, -0.1), "no clear change": (-0.1, 0.3)}
    for verdict, (low, high) in ends.items():
        assert retention.verdict(Interval(mean=(low + high) / 2, low=low, high=high, n=9)) == verdict


def test_weighted_sum_of_intervals():
    a, b = Interval(mean=0.5, low=0.2, high=0.9, n=3), Interval(mean=0.1, low=-0.3, high=0.4, n=4)
    both = combined([(a, 0.5), (b, 0.5)])
    assert (both.mean, both.n, both.method) == (pytest.approx(0.3), 7, MOVER)
    assert both.low == pytest.approx(0.3 - 0.25)  # half of the hypotenuse of 0.3 and 0.4
    assert both.high == pytest.approx(0.3 + 0.25)
    whole = mean_interval([0.0, 1.0, 1.0])
    assert combined([(whole, 1.0)]) == whole
    with pytest.raises(ValueError, match="no intervals"):
        combined([])


def coverage(experiments, sizes, forget, learn, seed=0):
    """The share of drawn experiments whose interval of the paired change of a mean over suites holds the true change."""
    rng = np.random.default_rng(seed)
    starts = np.linspace(0.3, 0.8, len(sizes))
    truth = float(np.mean([(1 - p) * learn - p * forget for p in starts]))
    held = 0
    for _ in range(experiments):
        parts = []
        for p, n in zip(starts, sizes, strict=True):
            before = rng.random(n) < p
            after = np.where(before, rng.random(n) >= forget, rng.random(n) < learn)
            parts.append((paired_difference(before.astype(float), after.astype(float)), 1 / len(sizes)))
            assert parts[-1][0].method == TANGO
        interval = combined(parts)
        held += interval.low <= truth <= interval.high
    return held / experiments


def test_interval_of_the_retention_covers_the_true_change():
    assert 0.93 <= coverage(1000, (50, 50), forget=0.2, learn=0.1) <= 0.97


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(50,) * 7, (100, 30), (30, 30, 30)])
@pytest.mark.parametrize(("forget", "learn"), [(0.05, 0.05), (0.2, 0.1), (0.4, 0.0)])
def test_interval_of_the_retention_covers_in_every_setting(sizes, forget, learn):
    assert 0.93 <= coverage(2000, sizes, forget, learn) <= 0.975
