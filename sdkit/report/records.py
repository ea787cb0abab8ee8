"""Reads what a report shows of runs and sets of runs, by the readers of `sdkit.runs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language.errors import SdkitError, UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.specs import ExperimentSpec
from sdkit.runs import directory
from sdkit.runs.directory import MARK, read_lines, read_status
from sdkit.runs.history import Run, read_run
from sdkit.runs.run_sets import is_set, read_set

Line = Mapping[str, Any]


@frozen(kw_only=True)
class RunRecord:
    """A run directory, except for completions, which `completions` reads one file at a time."""

    run: Run
    lines: Sequence[Line]  # of metrics.jsonl
    warnings: Sequence[Line]  # of warnings.jsonl
    provenance: Mapping[str, Any]
    status: Mapping[str, Any]
    spec: ExperimentSpec | None  # None if this sdkit refuses the run's spec
    base: Path  # where the spec's paths start

    @property
    def last_step(self) -> int:
        """The number of training steps that are on record."""
        return max((line["step"] for line in self.lines), default=0)


@frozen(kw_only=True)
class Subject:
    """What tables and curves show as one: a run, or the runs of several seeds."""

    name: str
    path: Path
    records: Sequence[RunRecord]


@frozen(kw_only=True)
class SetState:
    """A set of runs: its kind, and each member's state and overrides."""

    name: str
    path: Path
    kind: str
    members: Sequence[tuple[str, str, str]]


@frozen(kw_only=True)
class Contents:
    """Everything that a report is made of."""

    subjects: Sequence[Subject]
    sets: Sequence[SetState]

    @property
    def records(self) -> list[RunRecord]:
        """The runs of all subjects."""
        return [record for subject in self.subjects for record in subject.records]


def read_contents(paths: Sequence[Path]) -> Contents:
    """The runs and sets of runs in these folders; each named by its folder, or by its path where two have the same name.

    Raises UnreadableInput if a folder is neither, nothing has begun, or a file is damaged.
    """
    folders = [path.resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UnreadableInput(f"{folder} is named twice")
    names = [folder.name for folder in folders]
    parts: list[Subject | SetState] = []
    for path, folder in zip(paths, folders, strict=True):
        parts += _read_folder(path, folder.name if names.count(folder.name) == 1 else str(path))
    subjects = [part for part in parts if isinstance(part, Subject)]
    if not subjects:
        raise UnreadableInput(f"{', '.join(map(str, paths))}: no run has begun")
    return Contents(subjects=subjects, sets=[part for part in parts if isinstance(part, SetState)])


def _read_folder(path: Path, name: str) -> Iterator[Subject | SetState]:
    """The run in a folder, or the set there and its subjects.  Members that have not begun are in the set alone."""
    if not is_set(path):
        yield Subject(name=name, path=path, records=[_read_record(path, name)])
        return
    run_set = read_set(path)
    states = run_set.states()
    members = [(m.name, states[m.name], " ".join(m.overrides)) for m in run_set.members]
    yield SetState(name=name, path=path, kind=run_set.kind, members=members)
    begun = [m for m in run_set.members if (run_set.folder(m) / MARK).is_file() or is_set(run_set.folder(m))]
    runs = [m for m in begun if not is_set(run_set.folder(m))]
    if run_set.kind == "seeds" and runs:
        records = [_read_record(run_set.folder(member), f"{name}/{member.name}") for member in runs]
        yield Subject(name=name, path=path, records=records)
        begun = [member for member in begun if member not in runs]
    for member in begun:
        yield from _read_folder(run_set.folder(member), f"{name}/{member.name}")


def _read_record(path: Path, name: str) -> RunRecord:
    run = read_run(path, name, unevaluated=True)
    lines, warnings = (read_lines(path / file) for file in ("metrics.jsonl", "warnings.jsonl"))
    for file, part in (("metrics.jsonl", lines), ("warnings.jsonl", warnings)):
        for number, line in enumerate(part, start=1):
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise UnreadableInput(f"{path / file}:{number}: not a line of a run: it has no step")
    provenance = directory.provenance(path)
    base = Path(provenance.get("base", path))
    return RunRecord(
        run=run,
        lines=lines,
        warnings=warnings,
        provenance=provenance,
        status=read_status(path),
        spec=_spec(path, base),
        base=base,
    )


def _spec(run: Path, base: Path) -> ExperimentSpec | None:
    try:
        spec = load_spec(run / MARK, (), base=base).spec
    except SdkitError:
        return None
    return spec if isinstance(spec, ExperimentSpec) else None
