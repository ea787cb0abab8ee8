"""Runs against each other: where their budgets meet, how far apart they are there, and whether that can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from attrs import frozen

from sdkit.runs.intervals import (
    Interval,
    chance_of_paired,
    chance_of_unpaired,
    paired_difference,
    unpaired_difference,
)
from sdkit.runs.evaluations import Key
from sdkit.runs.history import Axis, Point, Run
from sdkit.language.errors import Path, UnreadableInput

ALIKE = 1.1
"""Budgets that differ by at most this factor count as one: rollouts of equally many steps differ in length."""
LEVEL = 0.95
DRAWS = 10_000
MOST_DRAWS = 40_000


@frozen(kw_only=True)
class CommonBudget:
    """Two runs at their largest common budget."""

    first: Run
    second: Run
    points: tuple[Point, Point]


@frozen(kw_only=True)
class Difference:
    """One score of the first run minus the second's, where they meet."""

    meeting: CommonBudget
    key: Key
    interval: Interval  # holds together with all others of the comparison
    sizes: tuple[int, int]  # prompts of each side
    paired: bool  # of the same prompts
    told: bool  # apart from noise

    def verdict(self) -> str:
        first, second, found = self.meeting.first.name, self.meeting.second.name, self.interval
        if not self.told:
            return "no difference can be told"
        if found.mean > 0:
            return (
                f"{first} is above {second} by {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
            )
        return (
            f"{second} is above {first} by {-found.mean:.3f} [{-found.high:.3f}, {-found.low:.3f}]"
        )


def keys_of(runs: Sequence[Run], score: str | None) -> list[Key]:
    """The scores that some run has, in order; with `score` those of this reward, or the one SUITE/DECODING/REWARD.

    Raises UnreadableInput where no run has it.
    """
    every = list(dict.fromkeys(k for run in runs for point in run.points for k in point.scores))
    found = [k for k in every if score in (None, k[2], "/".join(k))]
    if not found:
        known = ", ".join(dict.fromkeys(k[2] for k in every))
        raise UnreadableInput(f"no run has a score {score!r}; there are {known}")
    return found


def common_budget(first: Run, second: Run, axis: Axis) -> CommonBudget | None:
    """The evaluations after the largest budget that both have trained for; None where there are no such two.

    Untrained starts do not count.  Of several pairs within `ALIKE` of each other that with the largest smaller budget.
    """
    pairs = [
        (a, b)
        for a in first.points
        for b in second.points
        if 0 < max(a.at(axis), b.at(axis)) <= ALIKE * min(a.at(axis), b.at(axis))
    ]
    if not pairs:
        return None

    def budget(pair: tuple[Point, Point]) -> tuple[float, float]:
        low, high = sorted(point.at(axis) for point in pair)
        return low, low - high

    return CommonBudget(first=first, second=second, points=max(pairs, key=budget))


def common_budgets(runs: Sequence[Run], axis: Axis) -> list[tuple[Run, Run, CommonBudget | None]]:
    """Every two runs, and where they meet."""
    return [(a, b, common_budget(a, b, axis)) for a, b in combinations(runs, 2)]


def differences(found: Sequence[CommonBudget], keys: Sequence[Key]) -> list[Difference]:
    """Every score of every two runs.

    The intervals are simultaneous: Bonferroni over all of them.  A difference is told where its interval leaves out 0
    and a permutation test at the same level agrees, which a handful of prompts cannot pass.
    """
    held = [
        (m, key, [run.per_prompt(point).get(key) for run, point in _sides(m)])
        for m in found
        for key in keys
    ]
    both = [(m, key, a, b) for m, key, (a, b) in held if a and b]
    return [_difference(m, key, a, b, len(both)) for m, key, a, b in both]


def _sides(found: CommonBudget) -> list[tuple[Run, Point]]:
    return list(zip((found.first, found.second), found.points, strict=True))


def _difference(
    found: CommonBudget, key: Key, a: Mapping[str, float], b: Mapping[str, float], comparisons: int
) -> Difference:
    error = (1 - LEVEL) / comparisons
    draws = min(MOST_DRAWS, max(DRAWS, 2_000 * comparisons))  # 50 beyond each end of the interval
    paired = a.keys() == b.keys()
    if paired:
        values = [b[prompt] for prompt in a], list(a.values())
        interval = paired_difference(*values, resamples=draws, level=1 - error)
        chance = chance_of_paired(*values, resamples=draws)
    else:
        values = list(b.values()), list(a.values())
        interval = unpaired_difference(*values, resamples=draws, level=1 - error)
        chance = chance_of_unpaired(*values, resamples=draws)
    apart = interval.low > 0 or interval.high < 0
    return Difference(
        meeting=found,
        key=key,
        interval=interval,
        sizes=(len(a), len(b)),
        paired=paired,
        told=apart and chance <= error,
    )


# ── the specs ─────────────────────────────────────────────────────────────────────────────────


def differing(runs: Sequence[Run]) -> list[Path]:
    """Settings that are not the same in all runs; what is left behind (`output`) makes no difference."""
    every = dict.fromkeys(path for run in runs for path in run.settings if path[0] != "output")
    return [path for path in every if len({_value(run.settings, path) for run in runs}) > 1]


def differing_origins(runs: Sequence[Run]) -> list[Path]:
    """Versions and data that are not the same in all runs."""
    every = dict.fromkeys(path for run in runs for path in run.origins)
    return [path for path in every if len({_value(run.origins, path) for run in runs}) > 1]


def differing_evaluation(paths: Sequence[Path], keys: Sequence[Key]) -> list[Path]:
    """Those of the differing settings that say how scores are measured."""
    scores = {key[2].partition("/")[0] for key in keys}
    return [
        path
        for path in paths
        if (path[:2] == ("evaluation", "suites") and "loss_prompts" not in path)
        or (path[0] == "rewards" and path[1] in scores)
    ]


def _value(settings: Mapping[Path, object], path: Path) -> str:
    """Compared as text: 1 and True are not the same setting."""
    return repr(settings[path]) if path in settings else "no such key"
