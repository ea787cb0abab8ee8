"""`sdkit eval` on the runs of several seeds: each model in a process of its own, then the means over the seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict
from rich.console import Console
from rich.table import Table

from sdkit.distributed.launch import end_with_parent
from sdkit.language.errors import ERRORS, RunFailed, UnreadableInput
from sdkit.runs.directory import read_lines, trained_model
from sdkit.runs.evaluations import Key, interval_note, per_prompt, with_interval
from sdkit.runs.history import by_text
from sdkit.runs.intervals import Interval
from sdkit.runs.provenance import this_process
from sdkit.runs.run_sets import RunSet
from sdkit.runs.seed_intervals import BySeed, seeds_mean


def check_seeds(run_set: RunSet) -> None:
    """Raise UnreadableInput, before anything is computed, unless these are seeds, all with a trained model."""
    if run_set.kind != "seeds":
        raise UnreadableInput(
            f"{run_set.path} is a set of kind {run_set.kind}, not the runs of several seeds",
            hint=f"name one of its runs: {run_set.folder(run_set.members[0])}",
        )
    for member in run_set.members:
        trained_model(run_set.folder(member))


def evaluate_seeds(
    run_set: RunSet, overrides: Sequence[str], processes: int | None, to: Path, console: Console
) -> dict[Key, Interval]:
    """Evaluate the model of every seed, each into a folder below `to`; prints and returns the means over prompts and seeds.

    Raises an error of the class of the first evaluation that fails.
    """
    for member in run_set.members:
        folder = run_set.folder(member)
        console.print(f"evaluating {folder}", markup=False, highlight=False, soft_wrap=True)
        command = [sys.executable, "-m", "sdkit", "eval", str(folder), *overrides, "--to", str(to / member.name)]
        command += ["--processes", str(processes)] if processes else []
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # its tables are not this command's result
            check=False,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        if done.returncode:
            error = ERRORS.get(done.returncode, RunFailed)
            raise error(
                f"the evaluation of {folder} ended with exit code {done.returncode}", hint="the reason is above"
            )
    intervals = {key: seeds_mean(scores) for key, scores in read_scores(run_set, to).items()}
    console.print(means_table(intervals, len(run_set.members)))
    return intervals


def read_scores(run_set: RunSet, to: Path) -> dict[Key, BySeed]:
    """The scores of the evaluations below `to`, by seed and prompt."""
    scores: dict[Key, dict[int, Mapping[str, float]]] = {}
    for member in run_set.members:
        seed = member.settings["training"]["seed"]
        for key, prompts in per_prompt(read_lines(to / member.name / "completions.jsonl")).items():
            scores.setdefault(key, {})[seed] = by_text(prompts)
    return {key: each for key, each in scores.items() if len(each) == len(run_set.members)}


def means_table(intervals: Mapping[Key, Interval], seeds: int) -> Table:
    """A table of every score with its interval."""
    note = interval_note((interval.method for interval in intervals.values()), seeds=True)
    columns = ("suite", "decoding", "score", "mean [95 % interval]", "n")
    table = Table(*columns, title=f"held-out prompts, mean over {seeds} seeds", caption=note)
    for key, interval in intervals.items():
        table.add_row(*key, with_interval(interval), str(interval.n))
    return table


def report(run_set: RunSet, intervals: Mapping[Key, Interval]) -> dict[str, Any]:
    """The means with their intervals, of which runs and by which command, as JSON values."""
    scores = [
        dict(zip(("suite", "decoding", "score"), key, strict=True)) | asdict(interval)
        for key, interval in intervals.items()
    ]
    seeds = [member.settings["training"]["seed"] for member in run_set.members]
    return {"runs": str(run_set.path), "seeds": seeds, **this_process(), "scores": scores}


def write_report(to: Path, facts: Mapping[str, Any]) -> None:
    """Write evaluation.json into the folder, which holds the evaluation of each seed."""
    (to / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
