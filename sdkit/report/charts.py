"""Which metrics a report plots together, and their values as columns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import asdict, frozen

from sdkit.language.metric_names import GIVEN_FAILURE, INTERVAL_SUFFIXES, TURNS_TO_SUCCESS, metric_named
from sdkit.report.records import Contents, Line, RunRecord, Subject
from sdkit.report.sampling import spread
from sdkit.runs.history import AXES, Run, spent

LINES, STACKED = "lines", "stacked"
"""The kinds of charts; the metrics of a stacked one are parts of a sum."""
ENDING = "trajectory/ending_"
"""Begins the names of the shares of endings; those that never occur are not plotted."""
CURVES, BY_TURN = "charts", "turn-charts"
"""The elements of the page that hold charts: those of trajectories have a section of their own."""
TURN_PATTERNS: Sequence[tuple[str, str, str, str]] = (
    ("endings of trajectories, in training", "share", rf"{ENDING}.+", STACKED),
    ("success in a turn given failure before", "held out", rf"eval/[^/]+/[^/]+/{GIVEN_FAILURE}\d+", LINES),
    ("turns to success", "held out, mean", rf"eval/[^/]+/[^/]+/{TURNS_TO_SUCCESS}", LINES),
)
MAX_CELLS = 300_000
"""Most values of all runs' metrics in a page, about 20 bytes each."""

_TERM = r"(?:eval/)?(?:[^/]+/)?[^/]+"


@frozen(kw_only=True)
class Chart:
    """Metrics that share a vertical axis."""

    title: str
    unit: str
    metrics: Sequence[str]
    labels: Sequence[str]  # of the metrics, in a legend
    kind: str = LINES
    place: str = CURVES
    notes: Sequence[str] = ()  # formulas of the metrics


PATTERNS: Sequence[tuple[str, str, str, str]] = (
    ("loss", "", r"loss|eval/loss", LINES),
    ("new skill and retention", "held out", r"eval/(?:new_skill|retention)", LINES),
    ("training reward", "", r"reward/.+", LINES),
    ("completion length", "tokens", r"rollout/completion_tokens|eval/[^/]+/[^/]+/completion_tokens", LINES),
    ("entropy", "nats", rf"{_TERM}/(?:student|teacher)_entropy", LINES),
    ("divergence of student and teacher", "nats", rf"{_TERM}/(?:forward_kl|reverse_kl|k1|reference_kl|old_kl)", LINES),
    ("distance of the teacher's weights", "relative", r"teacher_distance", LINES),
    ("gradient norm", "", r"grad_norm", LINES),
    ("learning rate", "", r"lr", LINES),
    ("completions and groups", "share", r"rollout/(?:finished|kept|no_advantage|constant_groups|with_teacher)", LINES),
    ("time of a step", "s", r"time/(?:rollout|sync|judge|measure|teacher|update)", STACKED),
    ("throughput", "tokens/s", r"time/(?:trained_)?tokens_per_second", LINES),
    ("memory", "GiB", r"memory/.+", LINES),
)
"""Title, unit, metrics and kind of every chart besides those of scores."""


def charts(records: Sequence[RunRecord]) -> list[Chart]:
    """The charts of all metrics that the runs have: the suites' main scores, then training, then other held-out figures."""
    values = [item for record in records for line in record.lines for item in line.items()]
    names = list(dict.fromkeys(name for name, value in values if value or not name.startswith(ENDING)))
    runs = [record.run for record in records if record.run.points]
    main = {run.main_score(suite) for run in runs for suite in run.suites}
    held_out = {pair: _score_chart(*pair, metrics) for pair, metrics in _score_metrics(runs).items()}
    training, by_turn = _matching(PATTERNS, names, CURVES), _matching(TURN_PATTERNS, names, BY_TURN)
    first = [chart for pair, chart in held_out.items() if pair in main]
    return [*first, *training, *(chart for pair, chart in held_out.items() if pair not in main), *by_turn]


def _matching(patterns: Sequence[tuple[str, str, str, str]], names: Sequence[str], place: str) -> list[Chart]:
    """The charts of the patterns that match a metric."""
    found: list[Chart] = []
    for title, unit, pattern, kind in patterns:
        metrics = [name for name in names if re.fullmatch(pattern, name)]
        if metrics := sorted(metrics, key=lambda name: name.startswith("eval/")):
            parts = {"labels": _labels(metrics), "notes": _notes(metrics)}
            found.append(Chart(title=title, unit=unit, metrics=metrics, kind=kind, place=place, **parts))
    return found


def _score_metrics(runs: Sequence[Run]) -> dict[tuple[str, str], list[str]]:
    """Suite and reward → the metrics of each decoding."""
    metrics: dict[tuple[str, str], list[str]] = {}
    keys = [key for run in runs for point in run.points for key in point.scores]
    for suite, decoding, reward in dict.fromkeys(keys):
        metrics.setdefault((suite, reward), []).append(f"eval/{suite}/{decoding}/{reward}")
    return metrics


def _score_chart(suite: str, reward: str, metrics: Sequence[str]) -> Chart:
    unit = "held out, 95 % interval"
    return Chart(
        title=f"{suite}: {reward}", unit=unit, metrics=metrics, labels=_labels(metrics), notes=_notes(metrics)
    )


def _labels(metrics: Sequence[str]) -> list[str]:
    """The parts of the names that differ; those of held-out metrics say so, unless all are held out."""
    parts = [name.removeprefix("eval/").split("/") for name in metrics]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), shortest - start)
    names = ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]
    held_out = [name.startswith("eval/") for name in metrics]
    if all(held_out):
        return names
    return [f"{name}, held out" if is_held_out else name for name, is_held_out in zip(names, held_out, strict=True)]


def _notes(metrics: Sequence[str]) -> list[str]:
    found = [(name, metric_named(name)) for name in metrics]
    return [f"{name}: {metric.formula}" for name, metric in found if metric]


def columns(lines: Sequence[Line], cells: int) -> dict[str, Any]:
    """The metrics of a run as columns of equal length, None where a line does not have a metric, and the axes.

    Of more values than `cells`, the lines of steps are a sample at even distances; evaluations stay.
    """
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    numbered = list(enumerate(spent(lines)))
    steps = [i for i, _ in numbered if "eval/score" not in lines[i]]
    kept = set(spread(steps, max(2, cells // max(1, len(names)))))
    shown = [(lines[i], budget) for i, budget in numbered if i in kept or "eval/score" in lines[i]]
    return {
        "steps": [line["step"] for line, _ in shown],
        "tokens": [tokens for _, (tokens, _) in shown],
        "time": [seconds for _, (_, seconds) in shown],
        "metrics": {name: [_finite(line.get(name)) for line, _ in shown] for name in names},
        "all_lines": len(lines),
    }


def _finite(value: Any) -> float | None:
    """A number as JSON can hold it; None for what is no finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def data(shown: Sequence[Chart], contents: Contents) -> Mapping[str, Any]:
    """What the page's script reads: the charts, the columns of every run, its subject, and all metrics to choose from."""
    cells = MAX_CELLS // len(contents.records)
    runs = [
        {"name": record.run.name, "subject": number, **columns(record.lines, cells)}
        for number, subject in enumerate(contents.subjects)
        for record in subject.records
    ]
    names = sorted({name for run in runs for name in run["metrics"]})
    return {
        "charts": [asdict(chart) for chart in shown],
        "subjects": [{"name": subject.name, "bands": _bands(subject)} for subject in contents.subjects],
        "runs": runs,
        "metrics": [name for name in names if not (name.startswith("eval/") and name.endswith(INTERVAL_SUFFIXES))],
    }


def _bands(subject: Subject) -> dict[str, Any]:
    """The intervals of every score of a subject, with the budgets at which it was measured."""
    points = subject.run.points
    bands: dict[str, Any] = {}
    for key in dict.fromkeys(key for point in points for key in point.scores):
        scored = [point for point in points if key in point.scores]
        ends = {end: [_finite(getattr(point.scores[key], end)) for point in scored] for end in ("low", "high")}
        axes = {axis: [point.at(axis) for point in scored] for axis in AXES}
        bands["eval/" + "/".join(key)] = {**axes, **ends}
    return bands
