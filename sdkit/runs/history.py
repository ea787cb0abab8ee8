"""Finished and unfinished runs, read back from their directories.  Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from sdkit.runs.intervals import Interval
from sdkit.runs.evaluations import EvaluationResult, Key, per_prompt, read_back
from sdkit.runs.directory import MARK, read_lines
from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import UnreadableInput
from sdkit.language.resolved import leaves
from sdkit.language.source import read

Axis = Literal["tokens", "steps", "time"]
AXES: Mapping[Axis, str] = {
    "tokens": "generated tokens",
    "steps": "steps",
    "time": "training time without evaluation, s",
}


@frozen(kw_only=True)
class Point:
    """One evaluation of a run, and what training had cost until then."""

    step: int
    tokens: float  # of training rollouts
    seconds: float  # of training steps: without evaluations, checkpoints and start-up
    scores: Mapping[Key, Interval]

    def at(self, axis: Axis) -> float:
        return {"tokens": self.tokens, "steps": float(self.step), "time": self.seconds}[axis]


@frozen(kw_only=True)
class Run:
    """What a run directory says of a run."""

    name: str
    path: Path
    state: str
    settings: Mapping[SpecPath, Any]  # every scalar of the resolved spec
    origins: Mapping[SpecPath, Any]  # of provenance.json: what may differ without the spec
    points: Sequence[Point]  # evaluations in order, at least one

    @property
    def headline(self) -> Key:
        """The score that stands for the run: the first suite's first decoding."""
        suite, decoding, _ = next(iter(self.points[0].scores))
        return suite, decoding, str(self.settings["evaluation", "suites", suite, "score"])

    def records(self, point: Point) -> list[dict[str, Any]]:
        """Every completion of an evaluation with its scores."""
        return read_lines(_evaluation(self.path, point.step))

    def evaluated(self, point: Point) -> EvaluationResult:
        return read_back(self.records(point))

    def per_prompt(self, point: Point) -> dict[Key, dict[str, float]]:
        """Per score: of each prompt the mean over its samples.  A suite has no prompt twice."""
        found = per_prompt(self.records(point))
        return {key: {text: v for (_, text), v in each.items()} for key, each in found.items()}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders; each named by its folder, or by the whole path where two are called the same.

    Raises UnreadableInput, of all folders that hold no evaluated run at once.
    """
    places = [path.resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise UnreadableInput(f"{place} is named twice")
    names = [place.name for place in places]
    runs: list[Run] = []
    faults: list[str] = []
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_run(path, name if names.count(name) == 1 else str(path)))
        except UnreadableInput as error:
            faults.append(error.message)
    if faults:
        raise UnreadableInput(
            "\n".join(faults), hint="name run directories (runs/NAME) that `sdkit train` has left"
        )
    return runs


def read_run(path: Path, name: str) -> Run:
    """One run.  Raises UnreadableInput where the folder is no run directory, or nothing was evaluated in it."""
    if not (path / MARK).is_file():
        raise UnreadableInput(f"{path} is not a run directory: it has no {MARK}")
    spec = read(path / MARK, resolved=True).data
    if not isinstance(spec, dict):
        raise UnreadableInput(f"{path / MARK} is not a resolved spec")
    status = _json(path / "status.json")
    state = _state(status)
    try:
        points = tuple(_points(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableInput(f"{path / 'metrics.jsonl'} is not a run's: {error!r}") from None
    if not points:
        raise UnreadableInput(f"{path} holds no evaluation to compare ({state})")
    origins = _json(path / "provenance.json")
    kept = {part: origins.get(part) or {} for part in ("versions", "data")}
    return Run(
        name=name,
        path=path,
        state=state,
        settings=dict(leaves(spec)),
        origins=dict(leaves(kept)),
        points=points,
    )


def _points(path: Path) -> Iterator[Point]:
    """The evaluations whose completions are there too (of a run that goes on they are written last)."""
    tokens = seconds = 0.0
    for line in read_lines(path / "metrics.jsonl"):
        tokens = line.get("tokens_generated", tokens)
        seconds += line.get("time/step", 0.0)
        if "eval/score" in line and _evaluation(path, line["step"]).is_file():
            yield Point(step=line["step"], tokens=tokens, seconds=seconds, scores=_scores(line))


def _scores(line: Mapping[str, Any]) -> dict[Key, Interval]:
    found: dict[Key, Interval] = {}
    for name, mean in line.items():
        if name.count("/") >= 3 and f"{name}_low" in line:
            suite, decoding, reward = name.removeprefix("eval/").split("/", 2)
            ends = {end: line[f"{name}_{end}"] for end in ("low", "high")}
            found[suite, decoding, reward] = Interval(mean=mean, **ends, n=line[f"{name}_n"])
    return found


def _evaluation(path: Path, step: int) -> Path:
    return path / "evaluations" / f"step_{step:06d}.jsonl"


def _state(status: Mapping[str, Any]) -> str:
    state, reason = status.get("state", "of unknown state"), status.get("reason")
    if state == "done":
        return "done"
    after = f" after step {status['step']}" if "step" in status else ""
    # A killed process cannot say that it is.
    word = "unfinished, running or killed" if state == "running" else state
    return f"{word}{after}" + (f": {str(reason).splitlines()[0]}" if reason else "")


def _json(path: Path) -> dict[str, Any]:
    """A small file's object; empty where it is missing or torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
