"""Reads what a report shows of runs, by the readers of `sdkit.runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language.errors import SdkitError, UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.specs import ExperimentSpec
from sdkit.runs import directory
from sdkit.runs.directory import MARK, read_lines, read_status
from sdkit.runs.history import Run, read_runs

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


def read_records(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders, evaluated or not.  Raises UnreadableInput if a folder is none or a file is damaged."""
    return [_read_record(run) for run in read_runs(paths, unevaluated=True)]


def _read_record(run: Run) -> RunRecord:
    lines, warnings = (read_lines(run.path / name) for name in ("metrics.jsonl", "warnings.jsonl"))
    for name, part in (("metrics.jsonl", lines), ("warnings.jsonl", warnings)):
        for number, line in enumerate(part, start=1):
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise UnreadableInput(f"{run.path / name}:{number}: not a line of a run: it has no step")
    provenance = directory.provenance(run.path)
    base = Path(provenance.get("base", run.path))
    return RunRecord(
        run=run,
        lines=lines,
        warnings=warnings,
        provenance=provenance,
        status=read_status(run.path),
        spec=_spec(run.path, base),
        base=base,
    )


def _spec(run: Path, base: Path) -> ExperimentSpec | None:
    try:
        spec = load_spec(run / MARK, (), base=base).spec
    except SdkitError:
        return None
    return spec if isinstance(spec, ExperimentSpec) else None
