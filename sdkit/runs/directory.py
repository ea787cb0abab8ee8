"""The run directory: the spec, its provenance, every metric, every rollout.

spec.yaml         the run file as written         metrics.jsonl   one object a line, with `step`
resolved.yaml     every value of the spec         rollouts/       every rollout of every step
provenance.json   versions, git, data, attempts   samples/        a few as text, as JSON lines and Markdown
status.json       state: running, done, …         evaluations/    each held-out completion and its scores
warnings.jsonl    tripwires that went off         tensorboard/    events
plot.png          loss, score, length             error.txt       traceback of an unexpected failure
model/            the trained model               checkpoints/    what --resume continues from
result.json       scores before and after         retention.json  new skill and retention, with a panel
best/             the model of the best evaluation, with output.keep_best
measures.json     length, entropy, diversity before and after
lift.jsonl        completions from the teacher's prompt before training, each with the lift of its prompt
code/             the user's Python files: step_N/ has those that the run used after step N
git.diff          uncommitted changes of the spec's repository
wandb/            what the tracker wandb writes
bad_batches/      rollouts of a step whose loss or gradient was not finite
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit import processes
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.files import MAX_CONFIG_BYTES, read_json_object
from sdkit.language.source import read
from sdkit.runs.trackers import TrackedRun, Trackers

MARK = "resolved.yaml"
ORIGIN = "provenance.json"
STATUS = "status.json"


class RunDirectory:
    """Writes and reads one run's folder.  Knows names and formats; knows nothing of training."""

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self.path = path
        self._trackers = trackers or Trackers()
        self._purged: int | None = None  # a resumed run writes this step and all later ones again

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file atomically."""
        self.write_text(name, _json(value))

    def write_text(self, name: str, text: str) -> None:
        """Write a file atomically."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)

    def status(self, state: str, **facts: Any) -> None:
        """Write status.json: running, done, diverged, stopped, interrupted or failed, with the process and other facts."""
        process = {"pid": os.getpid(), "process": processes.own_start()}
        self.write_json(STATUS, {"state": state, **process, **facts})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, and give the same figures to the trackers."""
        self._append("metrics.jsonl", {"step": step, **values})
        self._tracked().metrics(step, values)

    def tracked_text(self, name: str, step: int, text: str) -> None:
        """Give the trackers a text in Markdown."""
        self._tracked().text(name, step, text)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]], page: str) -> None:
        """Write rollouts as text to samples/, `page` is the same in Markdown, and give them to the trackers."""
        self.lines("samples", step, records)
        self.write_text(f"samples/step_{step:06d}.md", page)
        self._tracked().text("samples", step, page)
        self._tracked().samples(step, records)

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """Give the trackers a run's settings and its results after `step`, for their tables of runs."""
        self._tracked().results(settings, results, step)

    def warning(self, step: int, facts: Mapping[str, Any]) -> None:
        """Append a line to warnings.jsonl."""
        self._append("warnings.jsonl", {"step": step, **facts})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise BadEnvironment(f"cannot write {self.path / name}: {error.strerror}") from None

    def lines(self, folder: str, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Write all records of one step, one JSON object a line."""
        self.json_lines(step_file(folder, step), records)

    def json_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file with one JSON object a line."""
        self.write_text(name, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records))

    def file(self, folder: str, step: int) -> Path:
        """The path that `lines` writes to."""
        return self.path / step_file(folder, step)

    def records(self, folder: str, step: int) -> list[dict[str, Any]]:
        """The records that `lines` wrote for one step; empty if there are none."""
        return read_lines(self.file(folder, step))

    def history(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def warnings(self) -> list[dict[str, Any]]:
        """Every line of warnings.jsonl."""
        return read_lines(self.path / "warnings.jsonl")

    def forget_after(self, step: int) -> None:
        """Remove everything about steps later than `step`: a resumed run writes it again."""
        self._purged = step + 1
        for name in ("metrics.jsonl", "warnings.jsonl"):
            path = self.path / name
            if path.is_file():
                lines = [line for line in read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        for folder in ("rollouts", "samples", "evaluations", "bad_batches"):
            for path in [p for ending in ("jsonl", "md") for p in (self.path / folder).glob(f"step_*.{ending}")]:
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()

    def _tracked(self) -> Trackers:
        """The trackers, open; their runs have the run's id, so that a resumed run continues them."""
        self._trackers.start(
            lambda: TrackedRun(
                folder=self.path,
                id=str(provenance(self.path).get("run") or self.path.name),
                settings=read(self.path / MARK, resolved=True).data or {},
                purge_from=self._purged,
            )
        )
        return self._trackers


class ReadOnly(RunDirectory):
    """The run directory on ranks other than the first: writes are ignored."""

    def write_text(self, name: str, text: str) -> None:
        pass

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        pass

    def forget_after(self, step: int) -> None:
        pass


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def step_file(folder: str, step: int) -> str:
    """The name of the file with one step's records, relative to the run directory."""
    return f"{folder}/step_{step:06d}.jsonl"


def origin(path: Path) -> dict[str, Any]:
    """The contents of provenance.json.  Raises UnreadableInput if the folder is not a run directory."""
    if not (path / MARK).is_file():
        raise UnreadableInput(f"{path} is not a run directory: it has no {MARK}")
    facts = provenance(path)
    if not isinstance(facts, dict) or "base" not in facts:
        raise UnreadableInput(f"{path / ORIGIN} does not name the folder of the run's spec")
    return facts


def trained_model(path: Path) -> Path:
    """The folder of a run's trained model.  Raises UnreadableInput if there is none yet."""
    if not (path / "model").is_dir():
        raise UnreadableInput(f"{path} has no model/ yet", hint="it appears when the run is done")
    return path / "model"


def claim(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write to `path`; writes nothing.

    Raises UnreadableInput if the folder exists already, is not a run directory, has nothing to resume, is being trained by
    another process, or has a name that DeepSpeed would read as a pattern when it loads a checkpoint.
    """
    if any(mark in str(path.resolve()) for mark in "[]*?"):
        raise UnreadableInput(
            f"{path.resolve()}: the path of a run directory may have none of [ ] * ?", hint="name another with --to"
        )
    in_use = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if resume:
        if not (path / MARK).is_file():
            raise UnreadableInput(f"{path} holds no run to resume")
        return
    if not in_use:
        return
    if not overwrite:
        raise UnreadableInput(
            f"{path} exists", hint="continue it with --resume, replace it with --overwrite, or name another with --to"
        )
    if not (path / MARK).is_file():
        raise UnreadableInput(f"{path} is not a run directory, so --overwrite leaves it alone")
    check_not_running(path)


def check_not_running(path: Path) -> None:
    """Raise UnreadableInput if a process is training the run in `path`."""
    status = read_status(path)
    if status.get("state") == "running" and processes.is_running(status.get("pid"), status.get("process")):
        raise UnreadableInput(
            f"{path} is still being trained by process {status['pid']}",
            hint="wait for it, or stop it with SIGTERM: it saves a checkpoint and ends",
        )


def create(path: Path, trackers: Trackers | None = None, *, replace: bool = False) -> RunDirectory:
    """Create an empty run directory at `path`, where with `replace` an older run is removed.

    Raises UnreadableInput as `claim` does: since a command started, another one may have begun a run there.
    """
    claim(path, resume=False, overwrite=replace)
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        raise UnreadableInput(f"cannot write to {path}: {error.strerror}") from None
    return RunDirectory(path, trackers)


def read_status(path: Path) -> Mapping[str, Any]:
    """The contents of status.json; empty if there is none."""
    return read_json_object(path / STATUS, MAX_CONFIG_BYTES) or {}


def record_failure(path: Path, reason: str) -> None:
    """Replace the state `running` in a run's status.json by `failed`, for a process of the run that can no longer do so."""
    status = read_status(path)
    if status.get("state") == "running":
        write_atomically(path / STATUS, _json({**status, "state": "failed", "reason": reason}))


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically, so that no reader ever sees half of it.  Raises BadEnvironment if the disk is full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadEnvironment(f"cannot write {path}: {error.strerror}") from None


def provenance(run: Path) -> dict[str, Any]:
    """The contents of provenance.json; empty if a run has none.  Raises UnreadableInput if it is not JSON."""
    path = run / ORIGIN
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UnreadableInput(f"cannot read {path}: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; an incomplete last line (from a killed run) is left out."""
    if not path.is_file():
        return []
    try:
        # Not splitlines(): JSON text may contain U+2028 and the like, which end a line only in Python.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableInput(f"cannot read {path}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UnreadableInput(f"{path}:{number}: not a JSON object") from None
    return records
