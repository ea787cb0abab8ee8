"""Success by turn: figures that are counted by hand, and the table of `sdkit compare`."""

from io import StringIO

import pytest
from rich.console import Console
from run_directories import write_run

from sdkit.runs.compare_text import compare
from sdkit.runs.intervals import mean_interval
from sdkit.runs.turns import success_by_turn, turn_metrics

PART = ("games", "drawn")


def within(*shares):
    """Scores within_K, one tuple of prompts for each K."""
    return {(*PART, f"within_{k}"): values for k, values in enumerate(shares, 1)}


def test_figures_are_those_of_the_trajectories():
    """Three prompts with two trajectories each: first successes in turns 1 and 2, 2 and none, 3 and none."""
    scores = within((0.5, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.5, 0.5))
    figures = success_by_turn(scores)[PART]
    assert figures.given_failure[2].mean == pytest.approx(2 / 5)
    assert figures.given_failure[3].mean == pytest.approx(1 / 3)
    assert (figures.given_failure[2].n, figures.given_failure[3].n) == (3, 2)
    assert figures.turns_to_success == pytest.approx((1 + 2 + 2 + 3) / 4)
    assert turn_metrics(scores)["eval/games/drawn/turns_to_success"] == 2.0


def test_interval_is_over_the_prompts_that_had_failed():
    scores = within([1.0] * 20 + [0.0] * 80, [1.0] * 60 + [0.0] * 40)
    share = success_by_turn(scores)[PART].given_failure[2]
    single = mean_interval([1.0] * 40 + [0.0] * 40)
    assert (share.n, share.mean) == (80, 0.5)
    assert (share.low, share.high) == pytest.approx((single.low, single.high), abs=0.002)


def test_nothing_is_divided_by_nothing():
    figures = success_by_turn(within((1.0, 1.0), (1.0, 1.0)))[PART]
    assert (figures.given_failure, figures.turns_to_success) == ({}, 1.0)
    failed = success_by_turn(within((0.0, 0.0), (0.0, 0.0)))[PART]
    assert (failed.given_failure[2].mean, failed.turns_to_success) == (0.0, None)
    assert failed.given_failure[2].high > 0.5
    assert success_by_turn({(*PART, "right"): (1.0,)}) == {}


def test_compare_prints_the_table(tmp_path):
    def scores(*shares):
        named = {("sums", "greedy", "right"): shares[-1]} | within(*shares)
        return {key: {f"prompt {i}": value for i, value in enumerate(values)} for key, values in named.items()}

    start = scores([0.0] * 10, [1.0] * 2 + [0.0] * 8)
    run = write_run(tmp_path / "run", {0: start, 2: scores([1.0] * 5 + [0.0] * 5, [1.0] * 6 + [0.0] * 4)})
    text = StringIO()
    compare([run], Console(file=text, width=200), tmp_path / "plot.png", "tokens", None)
    table = text.getvalue()[text.getvalue().index("success by turn") :]
    [second] = [line for line in table.splitlines() if "│ 2 " in line]
    assert [cell.split()[0] for cell in second.split("│")[5:9]] == ["0.200", "0.600", "0.200", "0.200"]
    [mean] = [line for line in table.splitlines() if "│ turns to" in line]
    assert [cell.strip() for cell in mean.split("│")[5:7]] == ["2.00", "1.17"]
