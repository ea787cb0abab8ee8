"""Reads sequences of runs from their folders, and writes what they show to sequence.json.

sequence.json   in the folder of a sequence, and of a set of seeds whose members are sequences:
    stages      names, in order
    suites      name → stage (null: retention), key (suite, decoding and reward of the score; null for an entry of the
                panel, which has the main scores of all its suites), prompts
    seeds       training.seed of each sequence, in order
    complete    whether every stage of every seed has finished
    matrix      one object for the start and one after each finished stage: after (stage, null at the start) and scores,
                suite → {mean, low, high, n, method}
    metrics     name → {mean, low, high, n, method}, once complete: accuracy, learned, backward_transfer,
                forward_transfer, forgetting; without those that no task has
    retention   suite → {mean, low, high, n, method}: the change of a suite that no stage trains on, once complete
    definitions metric → its definition and source, in words

Intervals are of 95 %, over prompts and seeds (sdkit/runs/transfer.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from sdkit.language.errors import UnreadableInput
from sdkit.runs.directory import write_atomically
from sdkit.runs.evaluations import Key
from sdkit.runs.history import Run, read_run
from sdkit.runs.intervals import Interval
from sdkit.runs.run_sets import FINISHED, RunSet, is_set, read_set
from sdkit.runs.transfer import Scores, Trajectory, matrix, metrics, retention

RESULT = "sequence.json"
DEFINITIONS: Mapping[str, str] = {
    "accuracy": "mean score of all tasks after the last stage (ACC of Lopez-Paz and Ranzato 2017, arXiv 1706.08840)",
    "learned": "mean change of a task's score in its own stage",
    "backward_transfer": "mean change of a task's score from its own stage to the last, over tasks before the last (BWT, "
    "arXiv 1706.08840); below 0: later stages harm earlier tasks",
    "forward_transfer": "mean change of a task's score from the start model to just before its stage, over tasks after the "
    "first (FWT, arXiv 1706.08840)",
    "forgetting": "mean of a task's best score after any stage before the last, minus that after the last (Chaudhry et al. "
    "2018, arXiv 1801.10112)",
    "retention": "change of a suite that no stage trains on, or of an entry of the panel, from the start model to the last "
    "stage",
}


@frozen(kw_only=True)
class SequenceRuns:
    """One sequence under one or several seeds."""

    name: str
    path: Path
    keys: Mapping[str, Key]  # suite → its score; without the entries of the panel
    seeds: tuple[int, ...]
    trajectories: tuple[Trajectory, ...]  # by seed

    @property
    def is_complete(self) -> bool:
        """Whether every stage of every seed has finished."""
        return all(run.is_complete for run in self.trajectories)


def holds_sequence(folder: Path) -> bool:
    """Whether the folder is that of a sequence, or of a set of seeds whose members are sequences."""
    return bool(_sequences(folder))


def _sequences(folder: Path) -> list[RunSet]:
    if not is_set(folder):
        return []
    run_set = read_set(folder)
    if run_set.kind == "sequence":
        return [run_set]
    members = [run_set.folder(member) for member in run_set.members] if run_set.kind == "seeds" else []
    inner = [read_set(member) for member in members if is_set(member)]
    return [member for member in inner if member.kind == "sequence"]


def read_sequence(folder: Path, name: str | None = None) -> SequenceRuns:
    """The sequence in `folder`, with all of its seeds that have been begun.

    Raises UnreadableInput if there is none, nothing has been evaluated, or the seeds are not of one sequence.
    """
    sets = _sequences(folder)
    if not sets:
        raise UnreadableInput(f"{folder} holds no sequence of runs")
    read = [pair for pair in map(_read_stages, sets) if pair is not None]
    if not read:
        raise UnreadableInput(f"{folder} holds no evaluation yet")
    trajectories = tuple(trajectory for trajectory, _ in read)
    shape = {(run.stages, tuple(run.suites.items())) for run in trajectories}
    prompts = {tuple((s, tuple(sorted(scores))) for s, scores in run.rows[0].items()) for run in trajectories}
    if len(shape) > 1 or len(prompts) > 1:
        raise UnreadableInput(f"the seeds in {folder} are of different sequences: stages, suites or prompts differ")
    first = read[0][1]
    keys = {suite: first.main_key(suite) for suite in trajectories[0].suites if suite in first.suites}
    seeds = tuple(int(run.settings["training", "seed"]) for _, run in read)
    return SequenceRuns(
        name=name or folder.resolve().name, path=folder, keys=keys, seeds=seeds, trajectories=trajectories
    )


def _read_stages(run_set: RunSet) -> tuple[Trajectory, Run] | None:
    """The scores of one sequence and its first run; None if the start model has not been evaluated yet."""
    suites: dict[str, str | None] = dict(run_set.facts["suites"])
    runs: list[Run] = []
    rows: list[Mapping[str, Scores]] = []
    for number, member in enumerate(run_set.members):
        folder = run_set.folder(member)
        if number and run_set.state(member) not in FINISHED:
            break
        try:
            run = read_run(folder, member.name)
        except UnreadableInput:
            break
        runs.append(run)
        rows += [_scores(run, 0, suites)] if number == 0 else []
        if run_set.state(member) not in FINISHED:
            break
        rows.append(_scores(run, -1, suites))
    if not runs:
        return None
    panel = {entry: None for entry in rows[0] if entry not in suites and all(entry in row for row in rows)}
    stages = tuple(member.name for member in run_set.members)
    return Trajectory(stages=stages, suites=suites | panel, rows=tuple(rows)), runs[0]


def _scores(run: Run, point: int, suites: Mapping[str, Any]) -> Mapping[str, Scores]:
    """Suite → its main score, also of each entry of the panel, with the prompts of all its suites."""
    per_prompt = run.per_prompt(run.points[point])
    scores = {suite: dict(per_prompt[run.main_key(suite)]) for suite in suites}
    for suite, entry in run.evaluated(run.points[point]).panel.items():
        of_suite = per_prompt[run.main_key(suite)]
        scores.setdefault(entry, {}).update({f"{suite}: {prompt}": score for prompt, score in of_suite.items()})
    return scores


def summary(sequence: SequenceRuns) -> dict[str, Any]:
    """What sequence.json holds."""
    runs, first = sequence.trajectories, sequence.trajectories[0]
    rows = matrix(runs)
    after = [None, *first.stages][: len(rows)]
    complete = sequence.is_complete
    return {
        "stages": list(first.stages),
        "suites": {
            suite: {
                "stage": stage,
                "key": "/".join(sequence.keys[suite]) if suite in sequence.keys else None,
                "prompts": len(first.rows[0][suite]),
            }
            for suite, stage in first.suites.items()
        },
        "seeds": list(sequence.seeds),
        "complete": complete,
        "matrix": [{"after": stage, "scores": _as_json(row)} for stage, row in zip(after, rows, strict=True)],
        "metrics": _as_json(metrics(runs)) if complete else {},
        "retention": _as_json(retention(runs)) if complete else {},
        "definitions": dict(DEFINITIONS),
    }


def _as_json(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: asdict(interval) for name, interval in intervals.items()}


def write_summary(sequence: SequenceRuns) -> Path:
    """Write sequence.json; returns its path."""
    target = sequence.path / RESULT
    write_atomically(target, json.dumps(summary(sequence), indent=1) + "\n")
    return target


def read_sequences(folders: Sequence[Path]) -> list[SequenceRuns]:
    """The sequences in these folders; each named by its folder, or by the path where two have the same name.

    Raises UnreadableInput if a folder holds none, or is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UnreadableInput(f"{twice} is named twice")
    if others := [str(folder) for folder in folders if not holds_sequence(folder)]:
        raise UnreadableInput(
            f"a sequence of runs is compared with others alone, and these hold none: {', '.join(others)}",
            hint="compare single runs with single runs, also the stages of a sequence: RUNS/STAGE",
        )
    names = [path.name for path in paths]
    return [
        read_sequence(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
