"""The tables and the plot of new skill against retention, of runs with a panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.report.facts import Row
from sdkit.report.records import Subject
from sdkit.runs import retention
from sdkit.runs.evaluations import interval_note, signed, with_interval
from sdkit.runs.intervals import Interval
from sdkit.runs.score_tables import Change


@frozen(kw_only=True)
class RetentionTables:
    """New skill and retention of every run with a panel, and the differences of pairs of runs."""

    rows: Sequence[Row]  # the run, then the figure; cells: before, after, change, its interval, prompts, verdict
    differences: Sequence[Row]  # two runs, no stages; cells: figure, difference, interval, verdict
    note: str
    plot: Sequence[Mapping[str, Any]]  # of each run its name, and the changes of retention (x) and new skill (y)


def retention_tables(subjects: Sequence[Subject]) -> RetentionTables | None:
    """The tables; None if no run has a panel at its start and its end."""
    runs = [subject.run for subject in subjects if subject.run.points]
    changes = {run.name: figures for run in runs if (figures := retention.of_run(run))}
    if not changes:
        return None
    methods = [i.method for figures in changes.values() for change in figures.values() for i in change.values()]
    return RetentionTables(
        rows=[
            Row(name=name if first else "", cells=[figure, *_cells(change)])
            for name, figures in changes.items()
            for first, (figure, change) in zip([True, *[False] * len(figures)], figures.items(), strict=False)
        ],
        differences=[
            Row(name=f"{d.first.name} − {d.second.name}", cells=[d.figure, *signed(d.interval), d.verdict])
            for d in retention.differences([s.run for s in subjects if s.run.points and not s.stage])
        ],
        note=interval_note(methods, seeds=any(len(run.members) > 1 for run in runs)),
        plot=[
            {
                "name": name,
                "x": _ends(figures[retention.RETENTION]["change"]),
                "y": _ends(figures[retention.NEW_SKILL]["change"]),
            }
            for name, figures in changes.items()
        ],
    )


def _cells(change: Change) -> list[str]:
    values = with_interval(change["before"]), with_interval(change["after"]), *signed(change["change"])
    return [*values, str(change["change"].n), retention.verdict(change["change"])]


def _ends(interval: Interval) -> dict[str, float]:
    """A mean, and the widths of its interval to both sides; 0 for an interval without an end, which cannot be drawn."""
    widths = {"low": interval.mean - interval.low, "high": interval.high - interval.mean}
    return {"mean": interval.mean} | {end: width if math.isfinite(width) else 0.0 for end, width in widths.items()}
