"""New skill against retention: the mean score of the task's suites, and of the panel's, before and after training.

A suite counts with its main reward under its first decoding.  The task's suites weigh the same, and so do the entries of
the panel, whatever the number of their suites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import frozen
from rich.markup import escape
from rich.table import Table

from sdkit.runs.compare import same_kind
from sdkit.runs.evaluations import EvaluationResult, Key, interval_metrics, interval_note, signed, with_interval
from sdkit.runs.history import Run
from sdkit.runs.intervals import Interval, combined
from sdkit.runs.score_tables import Change, change_record
from sdkit.runs.seed_intervals import weighted_change, weighted_difference, weighted_mean

NEW_SKILL = "new skill"
RETENTION = "retention"
METRICS = {NEW_SKILL: "eval/new_skill", RETENTION: "eval/retention"}

Weights = Mapping[Key, float]
"""The scores that make up a figure, and their weights, which sum to 1."""


@frozen(kw_only=True)
class FigureDifference:
    """The change of a figure in the first run minus that in the second."""

    first: Run
    second: Run
    figure: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """Which run's change is higher, if the interval excludes 0."""
        if self.interval.low <= 0 <= self.interval.high:
            return "no significant difference"
        return f"higher in {(self.first if self.interval.mean > 0 else self.second).name}"


def figures(result: EvaluationResult) -> dict[str, Weights]:
    """The two figures, then one for each entry of the panel; empty if the evaluation is without a panel."""
    entries: dict[str | None, list[Key]] = {}
    main = {key[0]: key for key in reversed(list(result.scores))}
    for suite in result.sizes:
        entries.setdefault(result.panel.get(suite), []).append(main[suite])
    task = entries.pop(None, [])
    if not entries or not task:
        return {}
    parts = {str(entry): {key: 1 / len(keys) for key in keys} for entry, keys in entries.items()}
    whole = {key: weight / len(parts) for part in parts.values() for key, weight in part.items()}
    return {NEW_SKILL: {key: 1 / len(task) for key in task}, RETENTION: whole, **parts}


def metrics(result: EvaluationResult) -> dict[str, float]:
    """eval/new_skill and eval/retention, each with its interval and n; empty without a panel."""
    values: dict[str, float] = {}
    weights = figures(result)
    for figure, name in METRICS.items() if weights else ():
        interval = combined([(result.interval(key), weight) for key, weight in weights[figure].items()])
        values |= interval_metrics(name, interval)
    return values


def means(result: EvaluationResult) -> dict[str, float]:
    """The mean score of each entry of the panel; empty without a panel."""
    parts = {name: part for name, part in figures(result).items() if name not in METRICS}
    return {
        name: sum(weight * sum(result.scores[key]) / len(result.scores[key]) for key, weight in part.items())
        for name, part in parts.items()
    }


def changes(before: EvaluationResult, after: EvaluationResult) -> dict[str, Change]:
    """Each figure's intervals before and after training and of the paired change; empty without a panel in both."""
    weights = figures(before)
    if any(key not in after.scores for part in weights.values() for key in part):
        return {}
    found: dict[str, Change] = {}
    for name, part in weights.items():
        measures = {
            "before": before.interval,
            "after": after.interval,
            "change": lambda key: after.difference(before, key),
        }
        found[name] = {
            when: combined([(measure(key), weight) for key, weight in part.items()])
            for when, measure in measures.items()
        }
    return found


def of_run(run: Run) -> dict[str, Change]:
    """Each figure of a run, or of the runs of several seeds as one, as `changes`; over seeds, the intervals count both."""
    if len(run.members) == 1:
        return changes(*run.ends)
    weights = figures(run.members[0].ends[0])
    start, end = (run.by_seed(point) for point in (run.points[0], run.points[-1]))
    if any(key not in start or key not in end for part in weights.values() for key in part):
        return {}
    return {
        name: {
            "before": weighted_mean([(start[key], weight) for key, weight in part.items()]),
            "after": weighted_mean([(end[key], weight) for key, weight in part.items()]),
            "change": weighted_change([(start[key], end[key], weight) for key, weight in part.items()]),
        }
        for name, part in weights.items()
    }


def differences(runs: Sequence[Run]) -> list[FigureDifference]:
    """Each pair's difference of the changes of each figure, paired by prompt, and by seed where both have the same.

    Pairs without a common panel, of other prompts, or of one run and several seeds are left out.
    """
    return [
        FigureDifference(first=first, second=second, figure=name, interval=interval)
        for first, second in combinations(runs, 2)
        if same_kind(first, second)
        for name, interval in _difference(first, second).items()
    ]


def _difference(first: Run, second: Run) -> dict[str, Interval]:
    weights = figures(first.members[0].ends[0])
    if weights != figures(second.members[0].ends[0]):
        return {}
    a, b, c, d = (run.by_seed(point) for run in (second, first) for point in (run.points[0], run.points[-1]))
    try:
        return {
            name: weighted_difference([((a[key], b[key]), (c[key], d[key]), w) for key, w in part.items()])
            for name, part in weights.items()
        }
    except (KeyError, ValueError):  # an evaluation without the panel, or other prompts
        return {}


def verdict(change: Interval) -> str:
    """Whether a change is told from chance by its 95 % interval."""
    if change.low > 0:
        return "gained"
    return "lost" if change.high < 0 else "no clear change"


def retention_table(runs: Mapping[str, Mapping[str, Change]], *, seeds: bool = False) -> Table:
    """A table of the figures of one or several runs, each under its name; an empty name is left out.

    `seeds`: the intervals count seeds, too.
    """
    several = any(runs)
    methods = [interval.method for figures in runs.values() for c in figures.values() for interval in c.values()]
    table = Table(title="new skill and retention", caption=interval_note(methods, seeds=seeds))
    for column in ["run"] * several + ["figure"]:
        table.add_column(column)
    for column in ("before", "after", "change", "95 % interval", "prompts"):
        table.add_column(column, justify="right")
    table.add_column("")
    for run, of_run in runs.items():
        for i, (name, change) in enumerate(of_run.items()):
            is_total = name in METRICS
            values = with_interval(change["before"]), with_interval(change["after"]), *signed(change["change"])
            named = [escape(run) if i == 0 else ""] * several + [escape(name if is_total else f"  {name}")]
            table.add_row(
                *named, *values, str(change["change"].n), verdict(change["change"]), style="bold" if is_total else None
            )
    return table


def differences_table(differences: Sequence[FigureDifference]) -> Table:
    """A table of the differences of pairs of runs."""
    table = Table(
        title="differences of the changes of new skill and retention",
        caption=interval_note(d.interval.method for d in differences) + "; not simultaneous",
    )
    for column in ("runs", "figure", "difference", "95 % interval", "verdict"):
        table.add_column(column, justify="right" if column in ("difference", "95 % interval") else "left")
    for d in differences:
        name = d.figure if d.figure in METRICS else f"  {d.figure}"
        pair = f"{d.first.name} − {d.second.name}"
        table.add_row(escape(pair), escape(name), *signed(d.interval), escape(d.verdict))
    return table


def retention_records(figures: Mapping[str, Change]) -> list[dict[str, Any]]:
    """The rows of the table as JSON values, for retention.json."""
    return [{"figure": name} | change_record(change) for name, change in figures.items()]


def panel_suites(runs: Sequence[Run]) -> set[str]:
    """The suites that belong to the panel in every run that has them."""
    results = [run.members[0].ends[0] for run in runs]
    task = {suite for result in results for suite in result.sizes if suite not in result.panel}
    return {suite for result in results for suite in result.panel} - task
