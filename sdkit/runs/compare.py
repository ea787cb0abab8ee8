"""Compares runs: their common budgets, the differences of their scores there, and which of them are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from sdkit.language.errors import Path, UnreadableInput
from sdkit.runs.evaluations import Key, is_pass_at
from sdkit.runs.history import Axis, Point, Run
from sdkit.runs.intervals import Interval, paired_difference, paired_p_value, unpaired_difference, unpaired_p_value
from sdkit.runs.seed_intervals import BySeed, difference_errors, mean_over_seeds, widened

BUDGET_TOLERANCE = 1.1
"""Budgets that differ by at most this factor count as equal: rollouts of equally many steps differ in length."""
LEVEL = 0.95
DRAWS = 10_000
MAX_DRAWS = 40_000


@frozen(kw_only=True)
class CommonBudget:
    """Two runs at their largest common budget."""

    first: Run
    second: Run
    points: tuple[Point, Point]


@frozen(kw_only=True)
class Difference:
    """One score of the first run minus the second's, at their common budget."""

    budget: CommonBudget
    key: Key
    interval: Interval  # simultaneous with all others of the comparison
    sizes: tuple[int, int]  # number of prompts of each run
    paired: bool  # whether both runs have the same prompts
    significant: bool

    def verdict(self) -> str:
        """The result in words: which run is above the other, or that the difference is not significant."""
        if not self.significant:
            return "no significant difference"
        first, second = self.budget.first.name, self.budget.second.name
        mean, low, high = self.interval.mean, self.interval.low, self.interval.high
        if mean > 0:
            return f"{first} is above {second} by {mean:.3f} [{low:.3f}, {high:.3f}]"
        return f"{second} is above {first} by {-mean:.3f} [{-high:.3f}, {-low:.3f}]"


def score_keys(runs: Sequence[Run], score: str | None) -> list[Key]:
    """The keys of all scores of the runs, in order.

    `score` selects those of one reward or pass_at_K, or the one SUITE/DECODING/REWARD; None: all of rewards.  Raises
    UnreadableInput if no run has it.
    """
    keys = list(dict.fromkeys(k for run in runs for point in run.points for k in point.scores))
    selected = [k for k in keys if (not is_pass_at(k) if score is None else score in (k[2], "/".join(k)))]
    if not selected:
        known = ", ".join(dict.fromkeys(k[2] for k in keys))
        raise UnreadableInput(f"no run has a score {score!r}; there are {known}")
    return selected


def same_kind(first: Run, second: Run) -> bool:
    """Whether both are single runs, or both have several seeds; of one run alone, no error over seeds is known."""
    return (len(first.members) > 1) == (len(second.members) > 1)


def common_budget(first: Run, second: Run, axis: Axis) -> CommonBudget | None:
    """The two runs' evaluations after their largest common budget; None if they have none.

    Evaluations before the first step do not count.  Of several pairs within `BUDGET_TOLERANCE`, the pair whose smaller
    budget is largest wins.
    """
    pairs = [
        (a, b)
        for a in first.points
        for b in second.points
        if 0 < max(a.at(axis), b.at(axis)) <= BUDGET_TOLERANCE * min(a.at(axis), b.at(axis))
    ]
    if not pairs:
        return None

    def budget(pair: tuple[Point, Point]) -> tuple[float, float]:
        low, high = sorted(point.at(axis) for point in pair)
        return low, low - high

    return CommonBudget(first=first, second=second, points=max(pairs, key=budget))


def differences(budgets: Sequence[CommonBudget], keys: Sequence[Key]) -> list[Difference]:
    """The difference of every score that both runs of a pair have.

    The intervals are simultaneous: Bonferroni over all of them.  A difference is significant if its interval excludes 0
    and a permutation test at the same level agrees, which a handful of prompts cannot pass.
    """
    scores = {id(budget): _scores_at(budget) for budget in budgets}
    candidates = [(budget, key, *(side.get(key) for side in scores[id(budget)])) for budget in budgets for key in keys]
    common = [(budget, key, a, b) for budget, key, a, b in candidates if a and b]
    return [_difference(budget, key, a, b, len(common)) for budget, key, a, b in common]


def _scores_at(budget: CommonBudget) -> list[Mapping[Key, BySeed]]:
    """The scores of both runs, by seed and prompt."""
    return [run.by_seed(point) for run, point in zip((budget.first, budget.second), budget.points, strict=True)]


def _difference(budget: CommonBudget, key: Key, first: BySeed, second: BySeed, comparisons: int) -> Difference:
    error = (1 - LEVEL) / comparisons
    draws = min(MAX_DRAWS, max(DRAWS, 2_000 * comparisons))  # 50 beyond each end of the interval
    a, b = mean_over_seeds(first), mean_over_seeds(second)
    paired = a.keys() == b.keys()
    if paired:
        values = [b[prompt] for prompt in a], list(a.values())
        interval = paired_difference(*values, resamples=draws, level=1 - error)
        p_value = paired_p_value(*values, resamples=draws)
    else:
        values = list(b.values()), list(a.values())
        interval = unpaired_difference(*values, resamples=draws, level=1 - error)
        p_value = unpaired_p_value(*values, resamples=draws)
    interval = widened(interval, difference_errors(second, first), 1 - error)
    excludes_zero = interval.low > 0 or interval.high < 0
    return Difference(
        budget=budget,
        key=key,
        interval=interval,
        sizes=(len(a), len(b)),
        paired=paired,
        significant=excludes_zero and p_value <= error,
    )


def differing_settings(runs: Sequence[Run]) -> list[Path]:
    """Settings that are not the same in all runs, without `output`, which does not affect training."""
    return [path for path in differing([run.settings for run in runs]) if path[0] != "output"]


def differing(maps: Sequence[Mapping[Path, object]]) -> list[Path]:
    """Keys that do not have the same value in all maps; 1 and True are not the same."""
    paths = dict.fromkeys(path for values in maps for path in values)
    return [p for p in paths if len({repr(values[p]) if p in values else None for values in maps}) > 1]


def differing_evaluation(paths: Sequence[Path], keys: Sequence[Key]) -> list[Path]:
    """The differing settings that affect how these scores are measured."""
    scores = {key[2].partition("/")[0] for key in keys}
    return [
        path
        for path in paths
        if (path[:2] in (("evaluation", "suites"), ("evaluation", "panel")) and "loss_prompts" not in path)
        or (path[0] == "rewards" and path[1] in scores)
    ]


def differing_reward_code(runs: Sequence[Run], origins: Sequence[Path], keys: Sequence[Key]) -> list[Path]:
    """The differing files of code, if one of these scores is, or may contain, a function of the user's."""
    scores = {key[2].partition("/")[0] for key in keys}
    kinds = {run.settings.get(("rewards", score, "kind")) for run in runs for score in scores}
    return [path for path in origins if path[0] == "code"] if kinds & {"file", "weighted"} else []
