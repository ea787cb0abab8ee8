"""The tables and the plot of tasks learned in sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import frozen

from sdkit.language.errors import counted
from sdkit.report.facts import Row
from sdkit.runs.evaluations import signed, with_interval
from sdkit.runs.sequence_text import TITLES, metric_differences
from sdkit.runs.sequences import DEFINITIONS, SequenceRuns
from sdkit.runs.transfer import matrix, metrics, retention

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
    return [
        Row(name=f"{first.name} − {second.name}", cells=[metric, *signed(interval), verdict])
        for first, second in combinations(complete, 2)
        for metric, interval, verdict in metric_differences(first, second)
    ]
