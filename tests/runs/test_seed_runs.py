"""The runs of several seeds as one run: what is read, compared, printed and plotted."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from run_directories import GREEDY, SPEC, score_of, write_run

from sdkit.language.errors import UnreadableInput
from sdkit.runs.compare import common_budget, differences, score_keys
from sdkit.runs.compare_text import compare
from sdkit.runs.intervals import mean_interval
from sdkit.runs.plot import figure_of_runs
from sdkit.runs.run_sets import Member, RunSet, write_set
from sdkit.runs.seed_intervals import (
    clustered_wilson,
    difference_errors,
    error_of_columns,
    seed_error,
    seeds_change,
    seeds_mean,
    weighted_change,
    weighted_difference,
    weighted_mean,
)
from sdkit.runs.seed_runs import read_runs


@pytest.fixture
def make_seeds(tmp_path):
    """Writes a set of runs: seed -> score of each prompt before and after training."""

    def make(name, scores, **changes):
        folder = tmp_path / name
        members = tuple(Member(name=f"seed_{seed}", spec="spec.yaml", settings={}) for seed in scores)
        write_set(RunSet(path=folder, kind="seeds", members=members))
        for seed, each in scores.items():
            spec = SPEC | {"training": SPEC["training"] | {"seed": seed}} | (changes.get(f"spec_{seed}") or {})
            if each:
                write_run(folder / f"seed_{seed}", dict(zip((0, 2), each, strict=True)), spec=spec)
        return folder

    return make


def seeds_at(*shares, seeds=(0, 1, 2)):
    """From 0.1 before training to these shares after it."""
    return {seed: (score_of(0.1), score_of(share)) for seed, share in zip(seeds, shares, strict=True)}


def test_standard_error_of_columns_is_that_of_the_analysis_of_variance():
    table = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])  # no rest: 2 prompts whose seeds differ by 1
    error, freedom = error_of_columns([(table, 1.0)])
    assert (error, freedom) == (pytest.approx((1 / 3) ** 0.5), 2)
    same, _ = error_of_columns([(np.array([[0.0, 0.0], [1.0, 1.0]]), 1.0)])
    assert same == 0


def test_one_seed_has_the_interval_of_a_single_run():
    scores = {3: score_of(0.4)}
    assert seed_error(scores) is None
    assert seeds_mean(scores) == mean_interval(list(score_of(0.4).values()))


def test_shares_of_independent_trials_have_wilsons_interval():
    """Shares of 0 and 1 are trials themselves; equal shares are as good as one trial for each prompt."""
    single = mean_interval([1.0] * 40 + [0.0] * 60)
    interval = clustered_wilson([1.0] * 40 + [0.0] * 60)
    assert (interval.low, interval.high) == pytest.approx((single.low, single.high), abs=0.002)
    nothing = clustered_wilson([0.0] * 100)
    assert (nothing.low, nothing.high) == (0, pytest.approx(mean_interval([0.0] * 100).high))


def test_seeds_that_differ_widen_the_interval():
    same, apart = ({s: score_of(share) for s, share in enumerate(shares)} for shares in ((0.4,) * 3, (0.3, 0.4, 0.5)))
    assert seeds_mean(same).mean == seeds_mean(apart).mean == pytest.approx(0.4)
    assert seeds_mean(apart).high - seeds_mean(apart).low > 1.3 * (seeds_mean(same).high - seeds_mean(same).low)
    assert "over seeds" in seeds_mean(apart).method


def test_change_is_paired_by_seed():
    """Every seed gains 0.1, so the seeds' differences leave no error in the change."""
    before = {seed: score_of(0.3 + 0.1 * seed) for seed in range(3)}
    after = {seed: score_of(0.4 + 0.1 * seed) for seed in range(3)}
    assert difference_errors(before, after)[0][0] == pytest.approx(0, abs=1e-12)
    others = {seed + 3: scores for seed, scores in after.items()}
    assert [freedom for _, freedom in difference_errors(before, others)] == [2, 2]
    assert difference_errors(before, others)[0][0] > 0.04
    assert seeds_change(before, after).mean == pytest.approx(0.1)


def noisy(seeds, shares, of=100):
    """Scores of 0 and 1 by seed and prompt, drawn with these probabilities."""
    rng = np.random.default_rng(0)
    return {
        seed: {f"prompt {i}": float(rng.random() < share) for i in range(of)}
        for seed, share in zip(seeds, shares, strict=True)
    }


def test_mean_and_change_of_several_suites_are_those_of_one_where_there_is_one():
    before, after = noisy((0, 1, 2), (0.1, 0.2, 0.4)), noisy((0, 1, 2), (0.6, 0.5, 0.9))
    assert weighted_mean([(before, 1.0)]) == seeds_mean(before)
    assert weighted_change([(before, after, 1.0)]) == seeds_change(before, after)
    unchanged = noisy((0, 1, 2), (0.1, 0.2, 0.4))
    difference = weighted_difference([((before, unchanged), (before, after), 1.0)])
    assert difference.mean == pytest.approx(seeds_change(before, after).mean)


def test_seeds_count_once_for_all_suites_of_a_mean():
    """A seed that raises every suite is one draw: suites do not average its effect away."""
    suites = [(noisy((0, 1, 2), (0.1, 0.5, 0.9)), 0.25)] * 4
    one, four = weighted_mean([(suites[0][0], 1.0)]), weighted_mean(suites)
    assert four.mean == pytest.approx(one.mean)
    assert four.high - four.low > 0.95 * (one.high - one.low)


def test_a_difference_of_changes_is_paired_by_seed_where_seeds_are_the_same():
    start = noisy((0, 1, 2), (0.1,) * 3)
    first = start, noisy((0, 1, 2), (0.2, 0.5, 0.8))
    paired = weighted_difference([(first, first, 1.0)])
    assert (paired.mean, paired.high) == (0, pytest.approx(-paired.low))
    others = tuple({seed + 3: scores for seed, scores in side.items()} for side in first)
    assert weighted_difference([(first, others, 1.0)]).high > 3 * paired.high
    with pytest.raises(ValueError, match="prompts differ"):
        weighted_difference([(first, (start, noisy((0, 1, 2), (0.2,) * 3, of=50)), 1.0)])


def test_folder_is_read_as_one_run(make_seeds):
    (run,) = read_runs([make_seeds("ours", seeds_at(0.3, 0.4, 0.5))])
    assert (run.name, run.state, run.seeds) == ("ours", "3 seeds done", [0, 1, 2])
    assert [point.step for point in run.points] == [0, 2]
    assert run.points[1].scores[GREEDY].mean == pytest.approx(0.4)
    assert run.points[1].tokens == 200
    assert ("training", "seed") not in run.settings


def test_seed_without_evaluation_is_counted(make_seeds):
    (run,) = read_runs([make_seeds("ours", seeds_at(0.3, 0.4, seeds=(0, 1)) | {2: None})])
    assert run.state == "2 seeds done; 1 not evaluated"
    with pytest.raises(UnreadableInput, match="holds no evaluated run"):
        read_runs([make_seeds("none", {0: None})])


def test_runs_of_different_specs_are_refused_by_name(make_seeds):
    other = {"training": {"seed": 1, "steps": 9}}
    folder = make_seeds("ours", seeds_at(0.3, 0.4, seeds=(0, 1)), spec_1=other)
    with pytest.raises(UnreadableInput, match=r"training\.steps: 2 in seed_0, 9 in seed_1"):
        read_runs([folder])


def difference(first, second):
    runs = read_runs([first, second])
    (result,) = differences([common_budget(*runs, "tokens")], score_keys(runs, None))
    return result


def test_two_folders_are_compared_by_seed_and_prompt(make_seeds):
    a, b = make_seeds("a", seeds_at(0.5, 0.6, 0.7)), make_seeds("b", seeds_at(0.3, 0.4, 0.5))
    result = difference(a, b)
    assert result.paired
    assert result.significant
    assert result.interval.mean == pytest.approx(0.2)
    noisy = difference(a, make_seeds("c", seeds_at(0.5, 0.4, 0.3)))
    assert noisy.interval.mean == pytest.approx(0.2)
    assert not noisy.significant
    assert "no significant difference" in noisy.verdict()


def printed(*folders, target):
    console = Console(file=StringIO(), width=200)
    compare(folders, console, target, "tokens", None)
    return console.file.getvalue()


def test_retention_over_seeds_is_compared(make_seeds, tmp_path):
    def scores(skill, letters):
        parts = {"sums": skill, "letters": letters, "legs": 0.5}
        return {(suite, "greedy", "right"): score_of(share) for suite, share in parts.items()}

    keeps = make_seeds("keeps", {s: (scores(0.1, 0.8), scores(0.4 + s / 10, 0.8)) for s in (0, 1)})
    loses = make_seeds("loses", {s: (scores(0.1, 0.8), scores(0.5 + s / 10, 0.1 + s / 50)) for s in (0, 1)})
    text = printed(keeps, loses, target=tmp_path / "plot.png")
    lines = [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in text.splitlines()]
    assert any(line.startswith("keeps new skill 0.100") for line in lines)
    assert any(line.startswith("retention 0.650") and line.endswith("200 lost") for line in lines)
    assert any(
        line.startswith("keeps − loses retention +0.345") and line.endswith("higher in keeps") for line in lines
    )


def test_comparison_says_what_its_intervals_are(make_seeds, make_run, tmp_path):
    a, b = make_seeds("a", seeds_at(0.5, 0.6, 0.7)), make_seeds("b", seeds_at(0.3, 0.4, seeds=(0, 5)))
    single = make_run("single", {0: score_of(0.1), 2: score_of(0.5)})
    text = " ".join(printed(a, b, single, target=tmp_path / "plot.png").split())
    assert "95 % intervals over prompts and seeds" in text
    assert "100 paired × seeds 3 and 2, not the same" in text
    assert "a and single: no verdict, single is one run and a has 3 seeds; train single with --seeds, too" in text
    assert "as random effects that cross" in text
    assert "With 2 seeds an interval can be wide" in text


def test_plot_has_a_thin_line_for_each_seed(make_seeds):
    runs = read_runs([make_seeds("a", seeds_at(0.5, 0.6, 0.7))])
    panel = figure_of_runs(runs, [GREEDY]).axes[0]
    thin = [line for line in panel.lines if line.get_linewidth() < 1]
    assert [line.get_ydata()[-1] for line in thin] == pytest.approx([0.5, 0.6, 0.7])
    assert len(panel.lines) == 4


def test_sweep_stands_for_its_points(make_seeds, make_run, tmp_path):
    folder = tmp_path / "sweep"
    members = tuple(Member(name=name, spec="spec.yaml", settings={}) for name in ("lr=1", "lr=2", "lr=3"))
    write_set(RunSet(path=folder, kind="sweep", members=members))
    make_run("sweep/lr=1", {0: score_of(0.1), 2: score_of(0.5)})
    make_seeds("sweep/lr=2", seeds_at(0.3, 0.4, seeds=(0, 1)))
    (folder / "lr=2" / "status.json").write_text('{"state": "done"}')
    assert [(run.name, run.seeds) for run in read_runs([folder])] == [("lr=1", [0]), ("lr=2", [0, 1])]
