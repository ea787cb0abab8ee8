"""Settings, origins, cost and notices of runs, as texts for tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import counted, spelled
from sdkit.plan.plan import plan_method
from sdkit.report import formula
from sdkit.report.records import RunRecord
from sdkit.runs.compare import differing, differing_settings

MISSING = "–"
PARTS = ("rollout", "sync", "judge", "measure", "teacher", "update")
"""The parts of a step, as under time/."""


@frozen(kw_only=True)
class Row:
    """A row of a table with a column for each run."""

    name: str
    cells: Sequence[str]


@frozen(kw_only=True)
class Notice:
    """Something that a reader must know of a run."""

    run: str
    text: str
    advice: str = ""
    steps: str = ""
    serious: bool = False


@frozen(kw_only=True)
class Objective:
    """What a run, or several with the same objective, minimises."""

    runs: Sequence[str]
    formulas: Sequence[str]  # MathML
    legend: Sequence[str]
    lines: Sequence[str]


def notices(records: Sequence[RunRecord]) -> list[Notice]:
    """How each run ended, what is missing of it, and its warnings."""
    return [notice for record in records for notice in _notices(record)]


def _notices(record: RunRecord) -> Iterator[Notice]:
    run = record.run
    if run.state != "done":
        yield Notice(run=run.name, text=f"the run is not done: {run.state}", serious=True)
    if not record.lines:
        yield Notice(run=run.name, text="no step is on record yet", serious=True)
    elif not run.points:
        yield Notice(run=run.name, text="the run has no evaluation, so it has no held-out scores")
    elif len(run.points) == 1:
        yield Notice(run=run.name, text="the run has one evaluation, so no change of a score is known")
    if record.spec is None:
        yield Notice(
            run=run.name, text="this version of sdkit does not accept the run's spec: no formula, no rollouts"
        )
    warnings: dict[tuple[str, str], list[int]] = {}
    for line in record.warnings:
        text = re.sub(r"\s+", " ", str(line.get("cause", line.get("wire", "warning"))))
        warnings.setdefault((text, str(line.get("look_at") or "")), []).append(line["step"])
    for (text, advice), steps in warnings.items():
        yield Notice(run=run.name, text=text, advice=advice, steps=_steps(steps))


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} times, steps {min(steps)} to {max(steps)}"


def objectives(records: Sequence[RunRecord]) -> list[Objective]:
    """The objectives of the runs; those that have the same one together."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.spec:
            plan = plan_method(record.spec)
            groups.setdefault((*plan.objective, *plan.roles), []).append(record)
    return [
        Objective(
            runs=[record.run.name for record in group],
            formulas=formula.formulas(group[0].spec),
            legend=list(formula.legend(group[0].spec)),
            lines=lines,
        )
        for lines, group in groups.items()
        if group[0].spec
    ]


def differences(records: Sequence[RunRecord]) -> list[Row]:
    """Settings and origins that differ between the runs."""
    runs = [record.run for record in records]
    origins = [run.origins for run in runs]
    rows = [_row(path, [run.settings for run in runs]) for path in differing_settings(runs)]
    return rows + [_row(path, origins, " (origin)") for path in differing(origins)]


def settings(records: Sequence[RunRecord]) -> list[Row]:
    """Every setting of the runs."""
    maps = [record.run.settings for record in records]
    return [_row(path, maps) for path in dict.fromkeys(path for values in maps for path in values)]


def _row(path: SpecPath, maps: Sequence[Mapping[SpecPath, Any]], suffix: str = "") -> Row:
    return Row(name=spelled(path) + suffix, cells=[_cell(values, path) for values in maps])


def _cell(values: Mapping[SpecPath, Any], path: SpecPath) -> str:
    if path not in values:
        return MISSING
    value = values[path]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def cost(records: Sequence[RunRecord]) -> list[Row]:
    """What the runs cost: steps, tokens, seconds by part, estimated device hours, memory."""
    columns = [_cost(record) for record in records]
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name=name, cells=[column.get(name, MISSING) for column in columns]) for name in names]


def _cost(record: RunRecord) -> dict[str, str]:
    lines = record.lines
    totals = {part: sum(line.get(f"time/{part}", 0.0) for line in lines) for part in ("step", "evaluation", *PARTS)}
    figures = {
        "steps": f"{record.last_step:,}",
        "generated tokens, training": f"{max((line.get('tokens_generated', 0) for line in lines), default=0):,.0f}",
        "evaluations": f"{len(record.run.points):,}",
        "training steps": _duration(totals["step"]),
    }
    figures |= {f"… {part}": _duration(totals[part]) for part in PARTS if totals[part]}
    figures["evaluation"] = _duration(totals["evaluation"])
    figures["device hours, estimated"] = f"{_device_seconds(record) / 3600:,.3g} × {_device(record)}"
    for name in ("peak_gib", "device_allocated_gib", "device_reserved_gib"):
        if peaks := [line[f"memory/{name}"] for line in lines if f"memory/{name}" in line]:
            figures[f"memory, {name.removesuffix('_gib').replace('_', ' ')}"] = f"{max(peaks):.2f} GiB"
    return figures


def _device_seconds(record: RunRecord) -> float:
    """Seconds of steps and evaluations × ranks of the attempt that did them."""
    attempts = record.provenance.get("attempts") or ()
    total = 0.0
    for line in record.lines:
        ranks = [a.get("ranks", 1) for a in attempts if a.get("after_step", 0) < max(line["step"], 1)]
        seconds = line.get("time/step", 0.0) + line.get("time/evaluation", 0.0)
        total += seconds * (ranks[-1] if ranks else 1)
    return total


def _device(record: RunRecord) -> str:
    names = dict.fromkeys(
        name
        for attempt in record.provenance.get("attempts") or ()
        for name in (attempt.get("hardware") or {}).get("accelerators") or ()
    )
    return ", ".join(names) or "CPU process"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def origins(record: RunRecord) -> list[tuple[str, str]]:
    """Where a run comes from: versions, commit, hashes."""
    facts = record.provenance
    git = facts.get("git") or {}
    rows = [("run directory", str(record.run.path)), ("started", str(facts.get("started", MISSING)))]
    if git:
        changed = git.get("changed") or ()
        rows.append(
            ("commit", str(git.get("commit")) + (f", {counted(len(changed), 'changed file')}" if changed else ""))
        )
    rows += [(name, str(facts[name])) for name in ("python", "platform") if name in facts]
    return rows + [(spelled(path), str(value)) for path, value in record.run.origins.items()]


def attempts(record: RunRecord) -> list[Mapping[str, str]]:
    """Every start of a run."""
    return [_attempt(attempt) for attempt in record.provenance.get("attempts") or ()]


def _attempt(attempt: Mapping[str, Any]) -> Mapping[str, str]:
    hardware = attempt.get("hardware") or {}
    accelerators = ", ".join(hardware.get("accelerators") or ()) or "no accelerator"
    machine = f"{hardware.get('host', MISSING)}: {hardware.get('cores', MISSING)} cores, {accelerators}"
    return {
        "after step": str(attempt.get("after_step", MISSING)),
        "started": str(attempt.get("started", MISSING)),
        "ranks": str(attempt.get("ranks", MISSING)),
        "machine": f"{machine}, {hardware.get('memory_gib', MISSING)} GiB",
        "command": " ".join(map(str, attempt.get("argv") or ())),
    }


def headings(record: RunRecord) -> list[str]:
    """A run in a few words: method, model, steps, state."""
    setting = record.run.settings
    model = setting.get(("model", "path"), "")
    planned = setting.get(("training", "steps"))
    steps = f"{record.last_step:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    return [str(model), f"{steps} steps", record.run.state]
