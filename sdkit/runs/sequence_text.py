"""Prints sequences of runs: the accuracy matrix, transfer and forgetting, and the differences of two sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdkit.language.errors import counted
from sdkit.runs.evaluations import signed, with_interval
from sdkit.runs.intervals import Interval
from sdkit.runs.sequences import SequenceRuns, read_sequences
from sdkit.runs.transfer import difference, matrix, metric_changes, metrics, retention, retention_changes

TITLES = {
    "accuracy": "accuracy",
    "learned": "learned in its stage",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}


def print_sequence(sequence: SequenceRuns, console: Console) -> None:
    """Print the accuracy matrix of a sequence and, once it is complete, its metrics."""
    console.print(_matrix_table(sequence))
    if sequence.is_complete:
        console.print(_metrics_table(sequence))


def compare(folders: Sequence, console: Console) -> None:
    """Print the sequences in these folders and what distinguishes each pair.

    Raises UnreadableInput if a folder holds no sequence.
    """
    sequences = read_sequences(folders)
    for sequence in sequences:
        print_sequence(sequence, console)
    for first, second in combinations(sequences, 2):
        _print_difference(first, second, console)


def _matrix_table(sequence: SequenceRuns) -> Table:
    runs, first = sequence.trajectories, sequence.trajectories[0]
    seeds = f", mean of {counted(len(runs), 'seed')}" if len(runs) > 1 else ""
    table = Table(title=f"{sequence.name}: score of every suite after every stage{seeds}", caption="95 % intervals")
    table.add_column("after")
    for suite, stage in first.suites.items():
        note = f"task of {stage}" if stage else "retention"
        table.add_column(f"{escape(suite)}\n[dim]{escape(note)}[/]", justify="right")
    for stage, row in zip(["the start", *first.stages], matrix(runs), strict=False):
        table.add_row(escape(stage), *(with_interval(interval) for interval in row.values()))
    return table


def _metrics_table(sequence: SequenceRuns) -> Table:
    table = Table(title=f"{sequence.name}: transfer and forgetting", caption="95 % intervals over prompts and seeds")
    for name in ("metric", "mean", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, interval in metrics(sequence.trajectories).items():
        table.add_row(TITLES[name], *signed(interval))
    for suite, interval in retention(sequence.trajectories).items():
        table.add_row(f"retention of {escape(suite)}", *signed(interval))
    return table


def _print_difference(first: SequenceRuns, second: SequenceRuns, console: Console) -> None:
    if not (first.is_complete and second.is_complete):
        unfinished = ", ".join(each.name for each in (first, second) if not each.is_complete)
        console.print(f"no differences yet: {unfinished} has not finished", markup=False, highlight=False)
        return
    table = Table(title=f"{first.name} minus {second.name}", caption="paired by prompt and seed")
    for name in ("metric", "difference", "95 % interval", "verdict"):
        table.add_column(name, justify="left" if name in ("metric", "verdict") else "right")
    for metric, interval, verdict in metric_differences(first, second):
        table.add_row(metric, *signed(interval), escape(verdict))
    if table.row_count:
        console.print(table)
    else:
        console.print(
            f"{first.name} and {second.name} have no suite with the same prompts and as many seeds",
            markup=False,
            highlight=False,
        )


def metric_differences(first: SequenceRuns, second: SequenceRuns) -> Iterator[tuple[str, Interval, str]]:
    """Every metric of the first minus that of the second, paired by prompt and seed, with a verdict; both are complete."""
    both = first.trajectories, second.trajectories
    own, other = (metric_changes(runs) | _named_retention(runs[0]) for runs in both)
    for name, changes in own.items():
        interval = difference(*both, (changes, other.get(name, []))) if changes else None
        if interval is not None:
            decided = interval.low > 0 or interval.high < 0
            higher = first.name if interval.mean > 0 else second.name
            verdict = f"higher in {higher}" if decided else "no significant difference"
            yield TITLES.get(name, name), interval, verdict


def _named_retention(run) -> dict:
    return {f"retention of {suite}": changes for suite, changes in retention_changes(run).items()}
