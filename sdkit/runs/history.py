"""Reads finished and unfinished runs from their directories.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import UnreadableInput
from sdkit.language.files import read_json_object
from sdkit.language.resolved import leaves
from sdkit.language.source import read
from sdkit.runs.directory import MARK, read_lines, read_status, step_file
from sdkit.runs.evaluations import EvaluationResult, Key, Prompt, per_prompt, read_back
from sdkit.runs.fingerprints import KINDS
from sdkit.runs.intervals import Interval
from sdkit.runs.seed_intervals import BySeed

Axis = Literal["tokens", "steps", "time"]
AXES: Mapping[Axis, str] = {
    "tokens": "generated tokens",
    "steps": "steps",
    "time": "training time without evaluation, s",
}

ORIGINS = ("versions", "data", "code", "models")
"""The parts of provenance.json that are compared: versions, and hashes of rows, code and local models."""
COMPLETION = {"suite", "decoding", "row", "prompt", "completion", "scores"}
"""What the record of a held-out completion has."""


@frozen(kw_only=True)
class Point:
    """One evaluation of a run, and the budget that training had spent by then."""

    step: int
    tokens: float  # of training rollouts
    seconds: float  # of training steps: without evaluations, checkpoints and start-up
    scores: Mapping[Key, Interval]

    def at(self, axis: Axis) -> float:
        """The budget spent on this axis."""
        return {"tokens": self.tokens, "steps": float(self.step), "time": self.seconds}[axis]


@frozen(kw_only=True)
class Run:
    """A run as its directory describes it."""

    name: str
    path: Path
    state: str
    settings: Mapping[SpecPath, Any]  # every scalar of the resolved spec
    origins: Mapping[SpecPath, Any]  # of provenance.json: ORIGINS, and which files have changed during the run
    points: Sequence[Point]  # evaluations in order; at least one, unless read with `unevaluated=True`

    @property
    def headline(self) -> Key:
        """The run's main score: that of the first suite under its first decoding."""
        return self.main_key(self.suites[0])

    @property
    def members(self) -> Sequence[Run]:
        """The runs that this one averages: itself, or one for each seed."""
        return (self,)

    @property
    def seeds(self) -> list[int]:
        """The values of training.seed, one for each of `members`."""
        return [run.settings.get(("training", "seed"), 0) for run in self.members]

    @property
    def suites(self) -> list[str]:
        """The names of the suites, in order."""
        return list(dict.fromkeys(suite for suite, _, _ in self.points[0].scores))

    def main_score(self, suite: str) -> tuple[str, str]:
        """A suite with its main reward; of a suite of the panel that is the first of its scores."""
        first = next(key[2] for key in self.points[0].scores if key[0] == suite)
        return suite, str(self.settings.get(("evaluation", "suites", suite, "score"), first))

    def main_key(self, suite: str) -> Key:
        """A suite's main score under its first decoding."""
        decoding = next(key[1] for key in self.points[0].scores if key[0] == suite)
        return suite, decoding, self.main_score(suite)[1]

    def records(self, point: Point) -> list[dict[str, Any]]:
        """Every completion of an evaluation with its scores.  Raises UnreadableInput if the file is damaged."""
        path = self.path / step_file("evaluations", point.step)
        records = read_lines(path)
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or COMPLETION - record.keys():
                raise UnreadableInput(f"{path}:{number}: not a held-out completion")
        return records

    def evaluated(self, point: Point) -> EvaluationResult:
        """The evaluation at this point, prompt by prompt."""
        return read_back(self.records(point))

    @cached_property
    def ends(self) -> tuple[EvaluationResult, EvaluationResult]:
        """The first and the last evaluation, read once."""
        return self.evaluated(self.points[0]), self.evaluated(self.points[-1])

    def per_prompt(self, point: Point) -> dict[Key, dict[str, float]]:
        """For each score and prompt, the mean over the prompt's samples.

        Prompts are known by their text, which tells runs on other rows apart; where tasks of an environment share one, by
        their row, too.
        """
        scores = per_prompt(self.records(point))
        return {key: by_text(prompts) for key, prompts in scores.items()}

    def by_seed(self, point: Point) -> Mapping[Key, BySeed]:
        """For each score, seed and prompt, the mean over the prompt's samples."""
        return {key: {self.seeds[0]: prompts} for key, prompts in self.per_prompt(point).items()}

    def changes(self, keys: Sequence[Key]) -> dict[Key, tuple[Interval, Interval, Interval]]:
        """The first and the last score and the paired change, for the keys that both evaluations have."""
        start, end = self.ends
        return {
            key: (start.interval(key), end.interval(key), end.difference(start, key))
            for key in keys
            if key in start.scores and key in end.scores
        }


def read_run(path: Path, name: str, *, unevaluated: bool = False) -> Run:
    """One run.  Raises UnreadableInput if the folder is not a run directory, or has no evaluation.

    `unevaluated`: a run without an evaluation is accepted.
    """
    if not (path / MARK).is_file():
        raise UnreadableInput(f"{path} is not a run directory: it has no {MARK}")
    spec = read(path / MARK, resolved=True).data
    if not isinstance(spec, dict):
        raise UnreadableInput(f"{path / MARK} is not a resolved spec")
    state = _state(read_status(path))
    try:
        points = tuple(_points(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableInput(f"{path / 'metrics.jsonl'} is not a run's: {error!r}") from None
    if not points and not unevaluated:
        raise UnreadableInput(f"{path} holds no evaluation to compare ({state})")
    origins = {part: value for part, value in read_origins(path).items() if value}
    return Run(
        name=name, path=path, state=state, settings=dict(leaves(spec)), origins=dict(leaves(origins)), points=points
    )


def by_text(prompts: Mapping[Prompt, float]) -> dict[str, float]:
    """Returns the values by the prompt's text, with the row where several prompts have the same."""
    if len({text for _, text in prompts}) == len(prompts):
        return {text: value for (_, text), value in prompts.items()}
    return {f"{text} (row {row})": value for (row, text), value in prompts.items()}


def read_origins(run: Path) -> dict[str, Any]:
    """The parts `ORIGINS` of a run's provenance.json, and `accepted_changes`: changed file → after which step."""
    provenance = read_json_object(run / "provenance.json") or {}
    origins = {part: provenance[part] for part in ORIGINS if part in provenance}
    if changes := accepted_changes(provenance):
        origins["accepted_changes"] = {name: f"after step {step}" for name, step in changes.items()}
    return origins


def accepted_changes(provenance: Mapping[str, Any]) -> dict[str, int]:
    """The files of code and local models that changed during a run, with the step after the latest change."""
    changes = provenance.get("accepted_changes") or ()
    return {name: change["step"] for change in changes for kind in KINDS for name in change.get(kind, ())}


def _points(path: Path) -> Iterator[Point]:
    """The evaluations whose completions are on disk (a running run writes them after the metrics)."""
    lines = read_lines(path / "metrics.jsonl")
    for line, (tokens, seconds) in zip(lines, spent(lines), strict=True):
        if "eval/score" in line and (path / step_file("evaluations", line["step"])).is_file():
            yield Point(step=line["step"], tokens=tokens, seconds=seconds, scores=_scores(line))


def spent(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """Generated tokens and seconds of training steps up to each line of metrics.jsonl."""
    tokens = seconds = 0.0
    for line in lines:
        tokens = line.get("tokens_generated", tokens)
        seconds += line.get("time/step", 0.0)
        yield tokens, seconds


def device_hours(lines: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> float:
    """Returns the hours of training steps and evaluations, times the ranks of the attempt that ran them.

    Start-up, checkpoints and steps that were lost when a run was killed are not included.
    """
    seconds = 0.0
    for line in lines:
        spent = line.get("time/step", 0.0) + line.get("time/evaluation", 0.0)
        ranks = [a.get("ranks", 1) for a in attempts if a.get("after_step", 0) < max(line["step"], 1)]
        seconds += spent * (ranks[-1] if ranks else 1)
    return seconds / 3600


def _scores(line: Mapping[str, Any]) -> dict[Key, Interval]:
    scores: dict[Key, Interval] = {}
    for name, mean in line.items():
        if name.count("/") >= 3 and f"{name}_low" in line:
            suite, decoding, reward = name.removeprefix("eval/").split("/", 2)
            ends = {end: line[f"{name}_{end}"] for end in ("low", "high")}
            scores[suite, decoding, reward] = Interval(mean=mean, **ends, n=line[f"{name}_n"])
    return scores


def _state(status: Mapping[str, Any]) -> str:
    state, reason = status.get("state", "of unknown state"), status.get("reason")
    if state == "done":
        return "done"
    after = f" after step {status['step']}" if "step" in status else ""
    # A killed process leaves "running" behind.
    word = "unfinished, running or killed" if state == "running" else state
    return f"{word}{after}" + (f": {str(reason).splitlines()[0]}" if reason else "")
