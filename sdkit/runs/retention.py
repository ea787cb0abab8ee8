"""New skill against retention: the mean score of the task's suites, and of the panel's, before and after training.

A suite counts with its main reward under its first decoding.  The task's suites weigh the same, and so do the entries of
the panel, whatever the number of their suites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from sdkit.runs.evaluations import EvaluationResult, Key, interval_metrics, interval_note, signed, with_interval
from sdkit.runs.intervals import Interval, combined
from sdkit.runs.score_tables import Change, change_record

NEW_SKILL = "new skill"
RETENTION = "retention"
METRICS = {NEW_SKILL: "eval/new_skill", RETENTION: "eval/retention"}

Weights = Mapping[Key, float]
"""The scores that make up a figure, and their weights, which sum to 1."""


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


def verdict(change: Interval) -> str:
    """Whether a change is told from chance by its 95 % interval."""
    if change.low > 0:
        return "gained"
    return "lost" if change.high < 0 else "no clear change"


def retention_table(runs: Mapping[str, Mapping[str, Change]]) -> Table:
    """A table of the figures of one or several runs, each under its name; an empty name is left out."""
    several = any(runs)
    methods = [interval.method for figures in runs.values() for c in figures.values() for interval in c.values()]
    table = Table(title="new skill and retention", caption=interval_note(methods))
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


def retention_records(figures: Mapping[str, Change]) -> list[dict[str, Any]]:
    """The rows of the table as JSON values, for retention.json."""
    return [{"figure": name} | change_record(change) for name, change in figures.items()]


def panel_suites(results: Sequence[EvaluationResult]) -> set[str]:
    """The suites that belong to the panel in every evaluation that has them."""
    task = {suite for result in results for suite in result.sizes if suite not in result.panel}
    return {suite for result in results for suite in result.panel} - task
