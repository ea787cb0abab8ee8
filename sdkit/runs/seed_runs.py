"""Reads the runs of several seeds as one: means over seeds, with intervals over prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from sdkit.language.errors import UnreadableInput, counted, first_of, shorten, spelled
from sdkit.runs.evaluations import Key
from sdkit.runs.history import Point, Run, read_run
from sdkit.runs.intervals import Interval
from sdkit.runs.run_sets import RunSet, is_set, read_set
from sdkit.runs.seed_intervals import BySeed, mean_over_seeds, seeds_change, seeds_mean

SEED = ("training", "seed")


@frozen(kw_only=True)
class SeedRuns(Run):
    """The runs of one spec under several seeds.  `points` are the evaluations that all have, as means over the seeds."""

    runs: Mapping[int, Run]

    @property
    def members(self) -> Sequence[Run]:
        return list(self.runs.values())

    def by_seed(self, point: Point) -> dict[Key, BySeed]:
        scores: dict[Key, dict[int, Mapping[str, float]]] = {}
        for seed, run in self.runs.items():
            for key, prompts in run.per_prompt(point).items():
                scores.setdefault(key, {})[seed] = prompts
        return {key: each for key, each in scores.items() if len(each) == len(self.runs)}

    def per_prompt(self, point: Point) -> dict[Key, dict[str, float]]:
        return {key: mean_over_seeds(scores) for key, scores in self.by_seed(point).items()}

    def changes(self, keys: Sequence[Key]) -> dict[Key, tuple[Interval, Interval, Interval]]:
        start, end = (self.by_seed(point) for point in (self.points[0], self.points[-1]))
        return {
            key: (seeds_mean(start[key]), seeds_mean(end[key]), seeds_change(start[key], end[key]))
            for key in keys
            if key in start and key in end
        }


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders; each named by its folder, or by the path where two folders have the same name.

    The runs of several seeds are one; a sweep stands for its points that have been evaluated.  Raises UnreadableInput,
    which names all folders that hold no evaluated run.
    """
    folders = [path.resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UnreadableInput(f"{folder} is named twice")
    names = [folder.name for folder in folders]
    runs: list[Run] = []
    faults: list[str] = []
    for path, name in zip(paths, names, strict=True):
        try:
            runs += _read_folder(path, name if names.count(name) == 1 else str(path))
        except UnreadableInput as error:
            faults.append(error.message)
    if faults:
        raise UnreadableInput(
            "\n".join(faults), hint="pass run directories (runs/NAME) that `sdkit train` has written"
        )
    return runs


def _read_folder(path: Path, name: str) -> list[Run]:
    """The run, the runs of several seeds as one, or the points of a sweep in a folder."""
    if not is_set(path):
        return [read_run(path, name)]
    run_set = read_set(path)
    if run_set.kind == "seeds":
        return [read_seeds(run_set, name)]
    if run_set.kind != "sweep":
        raise UnreadableInput(f"{path} is a set of kind {run_set.kind}: pass its runs, {path}/NAME")
    begun = [member for member in run_set.members if run_set.state(member) != "not started"]
    points: list[Run] = []
    faults: list[str] = []
    for member in begun:
        try:
            points += _read_folder(run_set.folder(member), member.name)
        except UnreadableInput as error:
            faults.append(error.message)
    if not points:
        raise UnreadableInput(f"{path} holds no evaluated run:\n{first_of(faults)}".rstrip(":\n"))
    return points


def read_seeds(run_set: RunSet, name: str) -> Run:
    """The runs of a set of kind `seeds` as one run; seeds that have not been evaluated yet are left out.

    Raises UnreadableInput if none has, or if their specs differ in more than the seed.
    """
    runs: dict[int, Run] = {}
    faults: list[str] = []
    for member in run_set.members:
        try:
            run = read_run(run_set.folder(member), f"{name}/{member.name}")
        except UnreadableInput as error:
            faults.append(error.message)
            continue
        runs[run.settings[SEED]] = run
    if not runs:
        raise UnreadableInput(f"{run_set.path} holds no evaluated run:\n" + first_of(faults))
    together = mean_of_seeds(run_set.path, name, list(runs.values()))
    missing = len(run_set.members) - len(runs)
    return evolve(together, state=f"{together.state}; {missing} not evaluated") if missing else together


def mean_of_seeds(folder: Path, name: str, members: Sequence[Run]) -> SeedRuns:
    """These evaluated runs of one spec under different seeds as one run, in the set of runs in `folder`.

    Raises UnreadableInput if their specs differ in more than the seed, or no step was evaluated in all of them.
    """
    _check_same_settings(folder, members)
    first = members[0]
    together = SeedRuns(
        name=name,
        path=folder,
        state=f"{counted(len(members), 'seed')} {', '.join(dict.fromkeys(run.state for run in members))}",
        settings={path: value for path, value in first.settings.items() if path != SEED},
        origins=first.origins,
        points=(),
        runs={run.settings[SEED]: run for run in members},
    )
    return evolve(together, points=tuple(_points(together)))


def _points(together: SeedRuns) -> list[Point]:
    """The evaluations after steps that all runs have, averaged over the runs."""
    by_step = [{point.step: point for point in run.points} for run in together.members]
    steps = [step for step in by_step[0] if all(step in each for each in by_step)]
    if not steps:
        raise UnreadableInput(f"{together.path}: no step was evaluated in the runs of all seeds")
    points = []
    for step in steps:
        same = [each[step] for each in by_step]
        scores = {key: seeds_mean(each) for key, each in together.by_seed(same[0]).items()}
        tokens, seconds = (
            sum(values) / len(same) for values in zip(*((p.tokens, p.seconds) for p in same), strict=True)
        )
        points.append(Point(step=step, tokens=tokens, seconds=seconds, scores=scores))
    return points


def _within_set(value: Any, run: Run) -> Any:
    """A setting; a path through the folder that holds the run is without its name, as a stage's path to the model before it."""
    return value.replace(f"/{run.path.parent.name}/", "/…/") if isinstance(value, str) else value


def _check_same_settings(folder: Path, runs: Sequence[Run]) -> None:
    """Raise UnreadableInput, naming keys, if the runs differ in more than seed and output."""
    first = runs[0].settings
    lines = []
    for run in runs[1:]:
        for path in dict.fromkeys([*first, *run.settings]):
            before, now = _within_set(first.get(path), runs[0]), _within_set(run.settings.get(path), run)
            if before != now and path != SEED and path[0] != "output":
                lines.append(
                    f"{spelled(path)}: {shorten(before)} in {runs[0].path.name}, {shorten(now)} in {run.path.name}"
                )
    if lines:
        raise UnreadableInput(
            f"the runs in {folder} have different specs, so they are not seeds of one:\n" + first_of(lines),
            hint="compare the run directories themselves, as separate runs",
        )
