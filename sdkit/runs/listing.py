"""`sdkit runs`: the runs below a folder, each with its state, its score and the command that comes next.  Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdkit import processes
from sdkit.language.errors import UnreadableInput, first_line
from sdkit.language.files import UnreadableFile, read_file, read_json_object
from sdkit.language.source import read
from sdkit.runs.directory import MARK, ORIGIN, STATUS
from sdkit.runs.evaluations import with_interval
from sdkit.runs.intervals import Interval
from sdkit.runs.run_sets import FINISHED, MANIFEST, RunSet, read_set, state_of
from sdkit.stdout import readable_duration

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "unreadable": "red"}
"""By state; of any other: yellow."""


@frozen(kw_only=True)
class ListedRun:
    """What a list shows of a run, or of a set of runs."""

    path: Path
    kind: str = "run"  # or that of a set: seeds, sweep, sequence
    members: Mapping[str, str] = {}  # of a set: name → state
    state: str  # as in status.json, or killed, or unreadable
    step: int | None = None
    steps: int | None = None  # of the whole run
    score_name: str | None = None  # SUITE/DECODING/REWARD
    score: Interval | None = None  # the headline score of the last evaluation
    updated: float | None = None  # when the status was written, seconds since 1970
    note: str | None = None  # why it ended early or cannot be read
    command: str | None = None  # what to do next; None: nothing, or not known

    def as_json(self) -> dict[str, Any]:
        """Returns the run as JSON values."""
        score = self.score and {
            "name": self.score_name,
            "mean": self.score.mean,
            "low": self.score.low,
            "high": self.score.high,
            "n": self.score.n,
        }
        updated = self.updated and datetime.fromtimestamp(self.updated, UTC).isoformat(timespec="seconds")
        return {
            "path": str(self.path),
            "kind": self.kind,
            "members": dict(self.members),
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "score": score,
            "updated": updated,
            "note": self.note,
            "next": self.command,
        }


def list_runs(folder: Path) -> list[ListedRun]:
    """Returns the runs in and below a folder, the one that was active last first; a set of runs is one entry.

    A run whose files are damaged is listed as unreadable.  Raises UnreadableInput if there is no such folder.
    """
    if not folder.is_dir():
        raise UnreadableInput(
            f"{folder} is not a folder", hint="name the folder that run directories are in: output.folder of the spec"
        )
    runs = [_listed_set(path) if is_set else _listed(path) for path, is_set in _run_directories(folder)]
    return sorted(runs, key=lambda run: (-(run.updated or 0.0), run.path))


def print_runs(runs: Sequence[ListedRun], console: Console) -> None:
    """Print a table of runs, then what to do next with each."""
    table = Table("run", "state", "step", "score", "age", box=None, pad_edge=False)
    for run in runs:
        colour = COLOURS.get(run.state, "yellow")
        score = f"{with_interval(run.score)} {run.score_name}" if run.score else "–"
        age = readable_duration(max(time.time() - run.updated, 0.0)) if run.updated else "–"
        name = str(run.path) + (f" ({run.kind})" if run.kind != "run" else "")
        table.add_row(escape(name), f"[{colour}]{run.state}[/]", _steps(run), escape(score), age)
    console.print(table)
    for run in runs:
        if run.note:
            console.print(f"{run.path}: {run.note}", markup=False, highlight=False, soft_wrap=True)
    if commands := list(_commands(runs)):
        console.print("\n[bold]next[/]")
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _commands(runs: Sequence[ListedRun]) -> Iterator[str]:
    """The commands that come next; runs with the same headline score are compared by one."""
    compared: dict[str, list[str]] = {}
    for run in runs:
        if run.score and run.score_name and run.state in ("done", "diverged"):
            compared.setdefault(run.score_name, []).append(str(run.path))
        elif run.command:
            yield run.command
    yield from (shlex.join(["sdkit", "compare", *paths]) for paths in compared.values())


def _steps(run: ListedRun) -> str:
    if run.members:
        return f"{sum(state in FINISHED for state in run.members.values())}/{len(run.members)} runs"
    if run.step is None:
        return "–"
    return f"{run.step}/{run.steps}" if run.steps else str(run.step)


def _run_directories(folder: Path) -> Iterator[tuple[Path, bool]]:
    """The run directories and the sets of runs in and below a folder, and whether each is a set.

    Nothing below them, and no hidden folder, is looked at.
    """
    for path, folders, files in os.walk(folder):
        if MARK in files or MANIFEST in files:
            folders.clear()
            yield Path(path), MANIFEST in files
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _listed_set(path: Path) -> ListedRun:
    """A set of runs, with the states of its members."""
    try:
        run_set = read_set(path)
    except UnreadableInput as error:
        return ListedRun(path=path, kind="set", state="unreadable", note=error.message)
    states, state = run_set.states(), state_of(path)
    written = [p.stat().st_mtime for p in (path / STATUS, *path.glob(f"*/{STATUS}")) if p.exists()]
    command = None if state == "running" else _continue_set(run_set)
    if all(member in FINISHED for member in states.values()):
        folders = [run_set.folder(member) for member in run_set.members] if run_set.kind == "sweep" else [path]
        command = shlex.join(["sdkit", "compare", *map(str, folders)])
    return ListedRun(
        path=path,
        kind=run_set.kind,
        members=states,
        state=state,
        updated=max(written, default=None),
        note=", ".join(f"{name} {member}" for name, member in states.items()),
        command=command,
    )


def _continue_set(run_set: RunSet) -> str | None:
    """The command that runs the unfinished members of seeds or a sweep; None for a set of another kind."""
    grid = dict(run_set.facts.get("grid", ()))
    first = run_set.members[0]
    # A member's overrides are the user's, then those that make this member.
    own = {*grid, "training.seed"}
    words = [first.spec, *(word for word in first.overrides if word.partition("=")[0] not in own)]
    for key, values in grid.items():
        words += ["--over", f"{key}={','.join(map(str, values))}"]
    if seeds := run_set.facts.get("seeds"):
        words += ["--seeds", ",".join(map(str, seeds))]
    command = {"seeds": "train", "sweep": "sweep"}.get(run_set.kind)
    return command and shlex.join(["sdkit", command, *words, "--to", str(run_set.path), "--resume"])


def _listed(path: Path) -> ListedRun:
    status = read_json_object(path / STATUS)
    if status is None:
        missing = not (path / STATUS).exists()
        note = "it was killed before its first step" if missing else f"{STATUS} is damaged"
        return ListedRun(path=path, state="killed" if missing else "unreadable", note=note, command=_resume(path))
    state, note = _state(path, status)
    try:
        score_name, score = _headline(path)
    except (UnreadableFile, ValueError, KeyError, TypeError) as error:
        return ListedRun(path=path, state="unreadable", note=f"metrics.jsonl is damaged: {first_line(error)}")
    return ListedRun(
        path=path,
        state=state,
        step=status.get("step"),
        steps=status.get("steps") or _steps_of_spec(path),
        score_name=score_name,
        score=score,
        updated=(path / STATUS).stat().st_mtime,
        note=note,
        command=_next(path, state, is_scored=score is not None),
    )


def _state(path: Path, status: Mapping[str, Any]) -> tuple[str, str | None]:
    """A run's state, and why it ended early.  A process that was killed leaves `running` behind."""
    state, reason = str(status.get("state", "unreadable")), status.get("reason")
    if state != "running":
        return state, str(reason).partition("\n")[0] if reason else None
    host = (_last_attempt(path).get("hardware") or {}).get("host")
    if host and host != platform.node():
        return "running", f"it runs, or was killed, on {host}"
    if processes.is_running(status.get("pid"), status.get("process")):
        return "running", f"process {status['pid']}"
    return "killed", "its process ended without a word: it was killed, or the machine went down"


def _headline(path: Path) -> tuple[str | None, Interval | None]:
    """The name and value of the main score of the last evaluation.  Raises as reading and parsing does."""
    if not (path / "metrics.jsonl").exists():
        return None, None
    lines = read_file(path / "metrics.jsonl").decode("utf-8").split("\n")[:-1]
    last = next((line for line in reversed(lines) if '"eval/score"' in line), None)
    if last is None:
        return None, None
    metrics = json.loads(last)
    before = list(metrics)[: list(metrics).index("eval/score")]
    # EvaluationResult.metrics writes the headline under its own name first.
    name = next((n for n in reversed(before) if n.count("/") == 3 and f"{n}_low" in metrics), None)
    if name is None:
        raise ValueError("an evaluation has no scores by name")
    low, high, n = (metrics[f"eval/score_{end}"] for end in ("low", "high", "n"))
    return name.removeprefix("eval/"), Interval(mean=metrics["eval/score"], low=low, high=high, n=n)


def _steps_of_spec(path: Path) -> int | None:
    """The length of a run of an older sdkit, whose status.json has none; None if the spec gives epochs."""
    training = _spec(path).get("training")
    return training.get("steps") if isinstance(training, Mapping) else None


def _spec(path: Path) -> Mapping[str, Any]:
    try:
        data = read(path / MARK, resolved=True).data
    except UnreadableInput:
        return {}
    return data if isinstance(data, Mapping) else {}


def _last_attempt(path: Path) -> Mapping[str, Any]:
    """The latest attempt in provenance.json, or the file itself, as a run of an older sdkit has it; empty without one."""
    facts = read_json_object(path / ORIGIN) or {}
    attempts = facts.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else facts
    return last if isinstance(last, Mapping) else {}


def _next(path: Path, state: str, *, is_scored: bool) -> str | None:
    if state == "running":
        return None
    if state not in ("done", "diverged"):
        return _resume(path)
    if is_scored:
        return shlex.join(["sdkit", "compare", str(path)])
    if _spec(path).get("evaluation"):
        return shlex.join(["sdkit", "eval", str(path)])
    return shlex.join(["sdkit", "export", str(path), "--to", f"{path.name}-model"])


def _resume(path: Path) -> str | None:
    """The command that continues a run: the one that started it, with --resume; None if it was no command of sdkit."""
    argv = _last_attempt(path).get("argv")
    words = [str(word) for word in argv[1:]] if isinstance(argv, list) else []
    if words[:1] not in (["train"], ["replay"]):
        return None
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return shlex.join(["sdkit", *kept, "--resume"])
