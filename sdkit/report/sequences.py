"""The tables and the plot of tasks learned in sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import frozen

from sdkit.language.errors import counted
from sdkit.report.facts import Row
from sdkit.runs.evaluations import signed, with_interval
from sdkit.runs.sequence_text import TITLES
from sdkit.runs.sequences import DEFINITIONS, SequenceRuns
from sdkit.runs.transfer import Trajectory, difference, matrix, metric_changes, metrics, retention, retention_changes

START = "the start"


@frozen(kw_only=True)
class SequenceTable:
    """One sequence: the score of every suite after every stage, and what follows from it."""

    name: str
    seeds: str  # how many, if there are several
    suites: Sequence[tuple[str, str]]  # name, and whose task it is
    matrix: Sequence[Row]
    metrics: Sequence[Row]  # empty until the last stage has finished
    definitions: Sequence[str]
    plot: Mapping[str, Any]  # what the page's script draws


def sequence_table(sequence: SequenceRuns) -> SequenceTable:
    """The tables of one sequence, over all of its seeds."""
    runs, first = sequence.trajectories, sequence.trajectories[0]
    rows = matrix(runs)
    stages = [START, *first.stages][: len(rows)]
    figures: dict[str, Any] = {}
    if sequence.is_complete:
        figures = {TITLES[name]: interval for name, interval in metrics(runs).items()}
        figures |= {f"retention of {suite}": interval for suite, interval in retention(runs).items()}
    lines = [
        {"suite": suite, **{end: [getattr(row[suite], end) for row in rows] for end in ("mean", "low", "high")}}
        for suite in first.suites
    ]
    return SequenceTable(
        name=sequence.name,
        seeds=f", {counted(len(runs), 'seed')}" if len(runs) > 1 else "",
        suites=[(suite, f"task of {stage}" if stage else "retention") for suite, stage in first.suites.items()],
        matrix=[
            Row(name=stage, cells=[with_interval(interval) for interval in row.values()])
            for stage, row in zip(stages, rows, strict=True)
        ],
        metrics=[Row(name=name, cells=signed(interval)) for name, interval in figures.items()],
        definitions=[f"{name.replace('_', ' ')}: {text}" for name, text in DEFINITIONS.items()],
        plot={"name": sequence.name, "stages": stages, "lines": lines},
    )


def sequence_differences(sequences: Sequence[SequenceRuns]) -> list[Row]:
    """Every metric of one complete sequence minus that of another, paired by prompt and seed."""
    complete = [sequence for sequence in sequences if sequence.is_complete]
    rows: list[Row] = []
    for first, second in combinations(complete, 2):
        both = first.trajectories, second.trajectories
        own, other = (_changes(runs) for runs in both)
        for name in own:
            interval = difference(*both, (own[name], other.get(name, []))) if own[name] else None
            if interval is None:
                continue
            decided = interval.low > 0 or interval.high < 0
            higher = first.name if interval.mean > 0 else second.name
            verdict = f"higher in {higher}" if decided else "no significant difference"
            rows.append(
                Row(name=f"{first.name} − {second.name}", cells=[TITLES.get(name, name), *signed(interval), verdict])
            )
    return rows


def _changes(runs: Sequence[Trajectory]) -> dict[str, Any]:
    of_suites = {f"retention of {suite}": changes for suite, changes in retention_changes(runs[0]).items()}
    return metric_changes(runs) | of_suites
