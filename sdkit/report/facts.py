"""Settings, origins, cost and notices of runs, as texts for tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import counted, spelled
from sdkit.language.specs import MethodSpec
from sdkit.plan.plan import plan_method
from sdkit.report import formula
from sdkit.report.records import Contents, RunRecord, Subject
from sdkit.runs.compare import differing, differing_settings
from sdkit.runs.history import device_hours

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

    runs: str
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


def notices(contents: Contents) -> list[Notice]:
    """How each run ended, what is missing of it, and its warnings; and the members of sets that have not begun."""
    found: list[Notice] = []
    for run_set in contents.sets:
        if waiting := [name for name, state, _ in run_set.members if state == "not started"]:
            found.append(Notice(runs=run_set.name, text=f"not started: {', '.join(waiting)}", serious=True))
    found += [notice for record in contents.records for notice in _notices(record)]
    same: dict[Notice, list[str]] = {}
    for notice in found:
        same.setdefault(evolve(notice, runs=""), []).append(notice.runs)
    grouped = [evolve(notice, runs=few_names(runs)) for notice, runs in same.items()]
    return sorted(grouped, key=lambda notice: not notice.serious)


def _notices(record: RunRecord) -> Iterator[Notice]:
    run = record.run
    if run.state != "done":
        yield Notice(runs=run.name, text=f"the run is not done: {run.state}", serious=True)
    if not record.lines:
        yield Notice(runs=run.name, text="no step is on record yet", serious=True)
    elif not run.points:
        yield Notice(runs=run.name, text="the run has no evaluation, so it has no held-out scores")
    elif len(run.points) == 1:
        yield Notice(runs=run.name, text="the run has one evaluation, so no change of a score is known")
    if record.spec is None:
        yield Notice(
            runs=run.name, text="this version of sdkit does not accept the run's spec: no formula, no rollouts"
        )
    warnings: dict[tuple[str, str], list[int]] = {}
    for line in record.warnings:
        text = re.sub(r"\s+", " ", str(line.get("cause", line.get("wire", "warning"))))
        warnings.setdefault((text, str(line.get("look_at") or "")), []).append(line["step"])
    for (text, advice), steps in warnings.items():
        yield Notice(runs=run.name, text=text, advice=advice, steps=_steps(steps))


def few_names(names: Sequence[str]) -> str:
    """The names, or the first of many and how many there are besides."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} times, steps {min(steps)} to {max(steps)}"


def objectives(subjects: Sequence[Subject]) -> list[Objective]:
    """The objectives of the runs; those that have the same one together."""
    groups: dict[tuple[str, ...], list[tuple[str, MethodSpec]]] = {}
    for subject in subjects:
        if spec := subject.records[0].spec:
            plan = plan_method(spec)
            groups.setdefault((*plan.objective, *plan.roles), []).append((subject.name, spec))
    return [
        Objective(
            runs=[name for name, _ in group],
            formulas=formula.formulas(group[0][1]),
            legend=list(formula.legend(group[0][1])),
            lines=lines,
        )
        for lines, group in groups.items()
    ]


def differences(subjects: Sequence[Subject]) -> list[Row]:
    """Settings and origins that differ between the subjects; of several seeds the first stands for all."""
    runs = [subject.records[0].run for subject in subjects]
    origins = [run.origins for run in runs]
    rows = [_row(path, [run.settings for run in runs]) for path in differing_settings(runs)]
    return rows + [_row(path, origins, " (origin)") for path in differing(origins)]


def settings(subjects: Sequence[Subject]) -> list[Row]:
    """Every setting of the subjects; of several seeds the first stands for all."""
    maps = [subject.records[0].run.settings for subject in subjects]
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


def cost(subjects: Sequence[Subject]) -> list[Row]:
    """What the subjects cost: steps, tokens, seconds by part, estimated device hours, memory; several seeds add up."""
    columns = [_cost(subject.records) for subject in subjects]
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name=name, cells=[column.get(name, MISSING) for column in columns]) for name in names]


def _cost(records: Sequence[RunRecord]) -> dict[str, str]:
    lines = [line for record in records for line in record.lines]
    totals = {part: sum(line.get(f"time/{part}", 0.0) for line in lines) for part in ("step", "evaluation", *PARTS)}
    tokens = sum(max((line.get("tokens_generated", 0) for line in record.lines), default=0) for record in records)
    figures = {
        **({"runs": str(len(records))} if len(records) > 1 else {}),
        "steps": f"{sum(record.last_step for record in records):,}",
        "generated tokens, training": f"{tokens:,.0f}",
        "evaluations": f"{sum(len(record.run.points) for record in records):,}",
        "training steps": _duration(totals["step"]),
    }
    figures |= {f"… {part}": _duration(totals[part]) for part in PARTS if totals[part]}
    figures["evaluation"] = _duration(totals["evaluation"])
    hours = sum(device_hours(record.lines, record.provenance.get("attempts") or ()) for record in records)
    figures["device hours, estimated"] = f"{hours:,.3g} × {_device(records[0])}"
    for name in ("peak_gib", "device_allocated_gib", "device_reserved_gib"):
        if peaks := [line[f"memory/{name}"] for line in lines if f"memory/{name}" in line]:
            figures[f"memory, {name.removesuffix('_gib').replace('_', ' ')}"] = f"{max(peaks):.2f} GiB"
    return figures


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


def headings(subject: Subject) -> list[str]:
    """A subject in a few words: model, steps, state."""
    records = subject.records
    setting = records[0].run.settings
    planned = setting.get(("training", "steps"))
    last = max(record.last_step for record in records)
    steps = f"{last:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    seeds = [f"{len(records)} seeds"] if len(records) > 1 else []
    states = dict.fromkeys(record.run.state for record in records)
    return [str(setting.get(("model", "path"), "")), f"{steps} steps", *seeds, "; ".join(states)]
