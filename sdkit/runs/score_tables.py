"""The scores of an evaluation, or of two, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sdkit.runs.evaluations import (
    FEW_PROMPTS_ADVICE,
    EvaluationResult,
    Key,
    few_prompts_warning,
    interval_note,
    signed,
    with_interval,
)
from sdkit.runs.intervals import Interval
from sdkit.stdout import print_warning

Change = Mapping[str, Interval]
"""The intervals of one score: `before` and `after` training, and of the paired `change`."""


def score_changes(before: EvaluationResult, after: EvaluationResult) -> dict[Key, Change]:
    """The intervals of every score that both have."""
    return {
        key: {"before": before.interval(key), "after": after.interval(key), "change": after.difference(before, key)}
        for key in before.scores
        if key in after.scores
    }


def comparison_table(changes: Mapping[Key, Change], first: Key) -> Table:
    """A table of every score before and after, with the interval of the paired change."""
    note = interval_note(change[name].method for change in changes.values() for name in ("before", "change"))
    table = Table(title="held-out prompts, from the student's own prompt", caption=note)
    for column in ("suite", "decoding", "score", "before", "after", "change", "95 % interval", "n"):
        table.add_column(column, justify="left" if column in ("suite", "decoding", "score") else "right")
    for key, change in changes.items():
        values = with_interval(change["before"]), with_interval(change["after"]), *signed(change["change"])
        style = "bold" if key[0] == first[0] and key[2] == first[2] else None
        table.add_row(*key, *values, str(change["change"].n), style=style)
    return table


def scores_table(result: EvaluationResult) -> Table:
    """A table of every score with its interval."""
    columns = ("suite", "decoding", "score", "mean [95 % interval]", "n")
    intervals = {key: result.interval(key) for key in result.scores}
    note = interval_note(interval.method for interval in intervals.values())
    table = Table(*columns, title="held-out prompts, from the model's own prompt", caption=note)
    for key, interval in intervals.items():
        table.add_row(*key, with_interval(interval), str(interval.n))
    return table


def score_records(result: EvaluationResult) -> list[dict[str, Any]]:
    """The rows of `scores_table` as JSON values: mean, interval, number of prompts, and the interval's method."""
    records: list[dict[str, Any]] = []
    for key in result.scores:
        interval = result.interval(key)
        names = dict(zip(("suite", "decoding", "score"), key, strict=True))
        ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        records.append({**names, **ends, "n": interval.n, "method": interval.method})
    return records


def comparison_records(changes: Mapping[Key, Change]) -> list[dict[str, Any]]:
    """The rows of `comparison_table` as JSON values, for result.json."""
    records: list[dict[str, Any]] = []
    for key, change in changes.items():
        ends = {name: [interval.mean, interval.low, interval.high] for name, interval in change.items()}
        methods = {name: interval.method for name, interval in change.items()}
        names = dict(zip(("suite", "decoding", "score"), key, strict=True))
        records.append({**names, **ends, "n": change["change"].n, "methods": methods})
    return records


def warn_of_few_prompts(console: Console, result: EvaluationResult) -> None:
    """Print a warning if a suite has too few prompts to tell small differences from chance."""
    if text := few_prompts_warning(result.sizes):
        print_warning(console, text, FEW_PROMPTS_ADVICE)
