"""Reads what a report shows of runs and sets of runs, by the readers of `sdkit.runs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from sdkit.language.errors import SdkitError, UnreadableInput
from sdkit.language.files import read_json_object
from sdkit.language.load import load_spec
from sdkit.language.specs import ExperimentSpec
from sdkit.runs import directory
from sdkit.runs.directory import MARK, read_lines
from sdkit.runs.history import Run, read_run
from sdkit.runs.run_sets import CHOICE, is_set, read_set
from sdkit.runs.seed_runs import mean_of_seeds
from sdkit.runs.sequences import SequenceRuns, holds_sequence, read_sequence

Line = Mapping[str, Any]


@frozen(kw_only=True)
class RunRecord:
    """A run directory, except for completions, which `completions` reads one file at a time."""

    run: Run
    lines: Sequence[Line]  # of metrics.jsonl
    warnings: Sequence[Line]  # of warnings.jsonl
    provenance: Mapping[str, Any]
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
    run: Run  # the run, or the mean over the seeds
    records: Sequence[RunRecord]
    stage: str | None = None  # if it is a stage of a sequence


@frozen(kw_only=True)
class SetState:
    """A set of runs: its kind, each member's state and overrides, and which point of a sweep is best, once it is known."""

    name: str
    kind: str
    members: Sequence[tuple[str, str, str]]
    verdict: str = ""


@frozen(kw_only=True)
class Contents:
    """Everything that a report is made of."""

    names: Sequence[str]  # of the folders that were given
    subjects: Sequence[Subject]
    sets: Sequence[SetState]
    sequences: Sequence[SequenceRuns]  # those whose start has been evaluated

    @property
    def records(self) -> list[RunRecord]:
        """The runs of all subjects."""
        return [record for subject in self.subjects for record in subject.records]


Part = Subject | SetState | SequenceRuns


def read_contents(paths: Sequence[Path]) -> Contents:
    """The runs and sets of runs in these folders; each named by its folder, and by parents where two have the same name.

    Raises UnreadableInput if a folder is neither, nothing has begun, or a file is damaged.
    """
    folders = [path.resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UnreadableInput(f"{folder} is named twice")
    names = [_short_name(folder, folders) for folder in folders]
    parts: list[Part] = []
    for path, name in zip(paths, names, strict=True):
        parts += _read_folder(path, name)
    subjects = [part for part in parts if isinstance(part, Subject)]
    if not subjects:
        raise UnreadableInput(f"{', '.join(map(str, paths))}: no run has begun")
    return Contents(
        names=names,
        subjects=subjects,
        sets=[part for part in parts if isinstance(part, SetState)],
        sequences=[part for part in parts if isinstance(part, SequenceRuns)],
    )


def _short_name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's name, with as many of its parents as tell it from the others."""
    depth = 1
    while sum(other.parts[-depth:] == folder.parts[-depth:] for other in folders) > 1:
        depth += 1
    return "/".join(folder.parts[-depth:])


def _read_folder(path: Path, name: str) -> Iterator[Part]:
    """The run in a folder, or the set there and its subjects.  Members that have not begun are in the set alone."""
    if not is_set(path):
        record = _read_record(path, name)
        yield Subject(name=name, run=record.run, records=[record])
        return
    run_set = read_set(path)
    states = run_set.states()
    members = [(m.name, states[m.name], " ".join(m.overrides)) for m in run_set.members]
    verdict = (read_json_object(path / CHOICE) or {}).get("verdict", "") if run_set.kind == "sweep" else ""
    yield SetState(name=name, kind=run_set.kind, members=members, verdict=str(verdict))
    begun = [m for m in run_set.members if (run_set.folder(m) / MARK).is_file() or is_set(run_set.folder(m))]
    folders = {f"{name}/{member.name}": run_set.folder(member) for member in begun}
    parts = [part for member, folder in folders.items() for part in _read_folder(folder, member)]
    subjects = [part for part in parts if isinstance(part, Subject)]
    if holds_sequence(path) and any(subject.run.points for subject in subjects):
        yield read_sequence(path, name)
    if run_set.kind == "sequence":
        subjects = [evolve(subject, stage=subject.run.path.name) for subject in subjects]
    if run_set.kind == "seeds":
        yield from (part for part in parts if isinstance(part, SetState))
        yield from _over_seeds(path, name, subjects)
    else:
        yield from (part for part in parts if not isinstance(part, Subject))
        yield from subjects


def _over_seeds(path: Path, name: str, subjects: Sequence[Subject]) -> Iterator[Subject]:
    """The runs of several seeds as one, or each stage of their sequences.

    Seeds that have not been evaluated do not count in the mean.  Raises UnreadableInput if the specs differ.
    """
    for stage in dict.fromkeys(subject.stage for subject in subjects):
        records = [record for subject in subjects if subject.stage == stage for record in subject.records]
        evaluated = [record.run for record in records if record.run.points]
        together = f"{name}/{stage}" if stage else name
        run = mean_of_seeds(path, together, evaluated) if len(evaluated) > 1 else (*evaluated, records[0].run)[0]
        yield Subject(name=together, run=evolve(run, name=together), records=records, stage=stage)


def _read_record(path: Path, name: str) -> RunRecord:
    run = read_run(path, name, unevaluated=True)
    lines, warnings = (read_lines(path / file) for file in ("metrics.jsonl", "warnings.jsonl"))
    for file, part in (("metrics.jsonl", lines), ("warnings.jsonl", warnings)):
        for number, line in enumerate(part, start=1):
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise UnreadableInput(f"{path / file}:{number}: not a line of a run: it has no step")
    provenance = directory.provenance(path)
    base = Path(provenance.get("base", path))
    return RunRecord(run=run, lines=lines, warnings=warnings, provenance=provenance, spec=_spec(path, base), base=base)


def _spec(run: Path, base: Path) -> ExperimentSpec | None:
    try:
        spec = load_spec(run / MARK, (), base=base).spec
    except SdkitError:
        return None
    return spec if isinstance(spec, ExperimentSpec) else None
