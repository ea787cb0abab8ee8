"""The scores and measures of an evaluation, or of two, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdkit.language.metric_names import WITHIN
from sdkit.runs.evaluations import (
    FEW_PROMPTS_ADVICE,
    EvaluationResult,
    Key,
    few_prompts_warning,
    interval_note,
    main_keys,
    signed,
    with_interval,
)
from sdkit.runs.intervals import Interval
from sdkit.runs.turns import success_by_turn
from sdkit.stdout import print_warning

Change = Mapping[str, Interval]
"""The intervals of one score or measure: `before` and `after` training, and of the paired `change`."""
SHOWN_MEASURES = {
    "completion_tokens": ("tokens", "{:.1f}"),
    "cut_at_limit": ("cut", "{:.0%}"),
    "entropy": ("entropy", "{:.3f}"),
    "distinct_2": ("distinct 2", "{:.3f}"),
    "self_repetition": ("repeated", "{:.1%}"),
}
"""The measures that tables show: their column and format."""
TO_SUCCESS = "turns to success"
TURN_COLUMNS = ("suite", "decoding", "turn", "within, before", "after", "given failure, before", "after")
TURNS_NOTE = (
    "within: success in this turn or an earlier one; given failure: success in this turn, of the trajectories without one "
    "before; turns to success: their mean, of the trajectories that succeed"
)
MEASURES_NOTE = "* the 95 % interval of the paired change excludes 0; docs/metrics.md defines the columns"


def score_changes(before: EvaluationResult, after: EvaluationResult) -> dict[Key, Change]:
    """The intervals of every score that both have."""
    return {
        key: {"before": before.interval(key), "after": after.interval(key), "change": after.difference(before, key)}
        for key in before.scores
        if key in after.scores
    }


def measure_changes(before: EvaluationResult, after: EvaluationResult) -> dict[Key, Change]:
    """The intervals of every measure that both evaluations have."""
    return {
        key: {
            "before": before.measure_interval(key),
            "after": after.measure_interval(key),
            "change": after.measure_difference(before, key),
        }
        for key in before.measures
        if key in after.measures
    }


def comparison_table(changes: Mapping[Key, Change], first: Key) -> Table:
    """A table of every score before and after, with the interval of the paired change."""
    note = interval_note(change[name].method for change in changes.values() for name in ("before", "change"))
    table = Table(title="held-out prompts, from the student's own prompt", caption=note)
    for column in ("suite", "decoding", "score", "before", "after", "change", "95 % interval", "n"):
        table.add_column(column, justify="left" if column in ("suite", "decoding", "score") else "right")
    for key in main_keys(changes):
        change = changes[key]
        values = with_interval(change["before"]), with_interval(change["after"]), *signed(change["change"])
        style = "bold" if key[0] == first[0] and key[2] == first[2] else None
        table.add_row(*key, *values, str(change["change"].n), style=style)
    return table


def scores_table(result: EvaluationResult) -> Table:
    """A table of every score with its interval."""
    columns = ("suite", "decoding", "score", "mean [95 % interval]", "n")
    intervals = {key: result.interval(key) for key in main_keys(result.scores)}
    note = interval_note(interval.method for interval in intervals.values())
    table = Table(*columns, title="held-out prompts, from the model's own prompt", caption=note)
    for key, interval in intervals.items():
        table.add_row(*key, with_interval(interval), str(interval.n))
    return table


def turn_rows(before: EvaluationResult, after: EvaluationResult | None) -> list[list[str]]:
    """Rows of `TURN_COLUMNS`: a row for each turn of each suite and decoding, and one for the mean turn of success.

    Empty if no turn was rewarded; without `after`, its cells are empty.
    """
    first, last = success_by_turn(before.scores), success_by_turn(after.scores) if after else {}
    rows: list[list[str]] = []
    for part, figures in first.items():
        sides = [(before, figures), (after, last.get(part))]
        for turn in figures.turns:
            key = (*part, f"{WITHIN}{turn}")
            within = [with_interval(of.interval(key)) if of and key in of.scores else "–" for of, _ in sides]
            given = [side.given_failure.get(turn) if side else None for _, side in sides]
            rows.append([*part, str(turn), *within, *(with_interval(share) if share else "–" for share in given)])
        means = [side.turns_to_success if side else None for _, side in sides]
        rows.append([*part, TO_SUCCESS, *("–" if mean is None else f"{mean:.2f}" for mean in means), "", ""])
    return rows


def turns_table(runs: Mapping[str, Sequence[Sequence[str]]]) -> Table:
    """A table of the `turn_rows` of one or several runs, each under its name; an empty name is left out."""
    several = any(runs)
    table = Table(
        title="success by turn, before → after training", caption=f"95 % intervals over prompts; {TURNS_NOTE}"
    )
    for name in ["run"] * several + list(TURN_COLUMNS[:3]):
        table.add_column(name, max_width=len("turns to") if name == "turn" else None)
    for name in TURN_COLUMNS[3:]:
        table.add_column(name, justify="right")
    for run, rows in runs.items():
        for row in rows:
            table.add_row(*[escape(run)] * several, *row)
    return table


def measures_table(means: Mapping[Key, float]) -> Table | None:
    """A table with a row for each decoding: the means of its completions' measures; None if there are none."""
    cells = {key: SHOWN_MEASURES[key[2]][1].format(mean) for key, mean in means.items() if key[2] in SHOWN_MEASURES}
    return _measures_table("completions", None, cells) if cells else None


def measure_changes_table(changes: Mapping[Key, Change]) -> Table | None:
    """A table with a row for each decoding: its completions' measures before and after; None if there are none."""
    cells: dict[Key, str] = {}
    for key, change in changes.items():
        if key[2] in SHOWN_MEASURES:
            text = SHOWN_MEASURES[key[2]][1]
            clear = " *" if change["change"].low > 0 or change["change"].high < 0 else ""
            cells[key] = f"{text.format(change['before'].mean)} → {text.format(change['after'].mean)}{clear}"
    return _measures_table("completions, before → after training", MEASURES_NOTE, cells) if cells else None


def _measures_table(title: str, note: str | None, cells: Mapping[Key, str]) -> Table:
    shown = [measure for measure in SHOWN_MEASURES if any(key[2] == measure for key in cells)]
    table = Table("suite", "decoding", title=title, caption=note)
    for measure in shown:
        table.add_column(SHOWN_MEASURES[measure][0], justify="right")
    for suite, decoding in dict.fromkeys(key[:2] for key in cells):
        table.add_row(suite, decoding, *(cells.get((suite, decoding, measure), "–") for measure in shown))
    return table


def score_records(result: EvaluationResult) -> list[dict[str, Any]]:
    """Every score as JSON values: mean, interval, number of prompts, and the interval's method."""
    return [_record(key, "score", result.interval(key)) for key in result.scores]


def measure_records(result: EvaluationResult) -> list[dict[str, Any]]:
    """Every measure as JSON values, like `score_records`."""
    return [_record(key, "measure", result.measure_interval(key)) for key in result.measures]


def _record(key: Key, kind: str, interval: Interval) -> dict[str, Any]:
    names = dict(zip(("suite", "decoding", kind), key, strict=True))
    ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {**names, **ends, "n": interval.n, "method": interval.method}


def comparison_records(changes: Mapping[Key, Change], kind: str = "score") -> list[dict[str, Any]]:
    """Changes as JSON values, for result.json and, with the kind `measure`, for measures.json."""
    return [
        dict(zip(("suite", "decoding", kind), key, strict=True)) | change_record(change)
        for key, change in changes.items()
    ]


def change_record(change: Change) -> dict[str, Any]:
    """The intervals of a change as JSON values."""
    ends = {when: [interval.mean, interval.low, interval.high] for when, interval in change.items()}
    return {**ends, "n": change["change"].n, "methods": {when: i.method for when, i in change.items()}}


def warn_of_few_prompts(console: Console, result: EvaluationResult) -> None:
    """Print a warning if a suite has too few prompts to tell small differences from chance."""
    if text := few_prompts_warning(result.sizes):
        print_warning(console, text, FEW_PROMPTS_ADVICE)
