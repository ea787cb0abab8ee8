"""A sweep: a run, or the runs of several seeds, for each point of a grid; the best one by a held-out suite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from sdkit.language.errors import Problem, UnreadableInput, counted, did_you_mean, listed, render
from sdkit.language.load import CheckedSpec, load_spec
from sdkit.language.resolved import resolved
from sdkit.language.specs import ExperimentSpec, Suite, Table
from sdkit.runs.directory import write_atomically
from sdkit.runs.evaluations import Key, interval_note, with_interval
from sdkit.runs.history import Run
from sdkit.runs.intervals import Interval, paired_difference
from sdkit.runs.plot import COLOURS
from sdkit.runs.run_sets import CHOICE, Member, RunSet
from sdkit.runs.seed_intervals import difference_errors, mean_over_seeds, widened
from sdkit.runs.seed_runs import read_runs
from sdkit.sets.grid import GridKey, Point
from sdkit.sets.seeds import first_overrides
from sdkit.stdout import print_warning

CHOOSES, REPORTS = "validation", "test"
"""The suites that choose the best point and report its score, if the spec has suites with these names."""

Last = Mapping[str, Mapping[Key, Interval]]
"""Of each point the score that chooses, then the one that reports, at its last evaluation."""


@frozen(kw_only=True)
class Choice:
    """The suite that chooses the best point, and the suite on which its score is reported."""

    chooses: str
    reports: str


def check_points(
    spec: Path, overrides: Sequence[str], points: Sequence[Point], seeds: Sequence[int]
) -> dict[Point, CheckedSpec]:
    """The checked spec of every point."""
    return {point: load_spec(spec, first_overrides([*overrides, *point.overrides], seeds)) for point in points}


def describe_problems(checked: Mapping[Point, CheckedSpec]) -> str:
    """The problems of all points, each once, with the points that have it unless all do; empty if there are none."""
    having: dict[Any, list[str]] = {}
    problems: dict[Any, tuple[Problem, Mapping[str, str]]] = {}
    for point, each in checked.items():
        for problem in each.problems:
            place = problem.place
            identity = place and (place.file, place.line, place.column), problem.message, problem.code
            having.setdefault(identity, []).append(point.name)
            problems.setdefault(identity, (problem, each.texts))
    blocks = []
    for identity, (problem, texts) in problems.items():
        names = having[identity]
        where = "" if len(names) == len(checked) else f"  = in {counted(len(names), 'point')}: {listed(names)}"
        blocks.append("\n".join(filter(None, [render([problem], texts), where])))
    return "\n".join(blocks)


def sweep_set(
    checked: Mapping[Point, CheckedSpec],
    spec: Path,
    overrides: Sequence[str],
    keys: Sequence[GridKey],
    seeds: Sequence[int],
    folder: Path,
) -> RunSet:
    """The set of one run, or one set of seeds, for each point."""
    members = [
        Member(name=point.name, spec=str(spec), overrides=(*overrides, *point.overrides), settings=resolved(each.spec))
        for point, each in checked.items()
    ]
    facts: dict[str, Any] = {"grid": [[key.key, list(key.values)] for key in keys]}
    return RunSet(
        path=folder, kind="sweep", members=tuple(members), facts=facts | ({"seeds": list(seeds)} if seeds else {})
    )


def choose_suites(spec: ExperimentSpec, chooses: str | None, reports: str | None) -> Choice:
    """The suites that choose and report: those named, else `validation` and `test`, else the first and the next one.

    Raises UnreadableInput if the spec has no such suite, or none at all.
    """
    names = list(spec.suites)
    if not names:
        raise UnreadableInput(
            "a sweep needs held-out prompts to choose the best point by, but the run file has no evaluation",
            hint="add evaluation.suites; a suite named validation chooses, one named test reports",
        )
    for option, name in (("--choose", chooses), ("--report", reports)):
        if name is not None and name not in names:
            hint = did_you_mean(name, names) or f"there are {listed(names)}"
            raise UnreadableInput(f"{option} {name}: there is no suite with this name", hint=hint)
    chooses = chooses or (
        CHOOSES if CHOOSES in names else next((n for n in names if n != (reports or REPORTS)), names[0])
    )
    others = [name for name in names if name != chooses]
    return Choice(chooses=chooses, reports=reports or (REPORTS if REPORTS in others else (others or [chooses])[0]))


def same_prompts_warning(choice: Choice, suites: Table[Suite]) -> str | None:
    """A warning that names the suite if the point is chosen and reported on the same prompts."""
    if choice.chooses == choice.reports:
        return f"suite {choice.chooses} chooses the best point and reports its score, which will be too high"
    if suites[choice.chooses].data == suites[choice.reports].data:
        return (
            f"suites {choice.chooses} and {choice.reports} have the same data: the one chooses the best point, the other "
            "reports its score, which will be too high"
        )
    return None


def overlap_warning(choice: Choice, run: Run) -> str | None:
    """A warning if the two suites turned out to have prompts in common."""
    scores = run.per_prompt(run.points[-1])
    prompts = [
        {p for key, each in scores.items() if key[0] == suite for p in each}
        for suite in (choice.chooses, choice.reports)
    ]
    common = prompts[0] & prompts[1]
    if choice.chooses == choice.reports or not common:
        return None
    return (
        f"{counted(len(common), 'prompt')} of suite {choice.reports}, which reports, are in suite {choice.chooses}, too, which "
        "chooses: the reported score will be too high"
    )


def report_sweep(run_set: RunSet, choice: Choice, suites: Table[Suite], console: Console) -> None:
    """Print and plot the scores of all points, and name the best one.

    Raises UnreadableInput if no point has been evaluated.
    """
    runs = read_runs([run_set.path])
    keys = [runs[0].main_key(suite) for suite in dict.fromkeys((choice.chooses, choice.reports))]
    last = {run.name: {key: change[1] for key, change in run.changes(keys).items()} for run in runs}
    best = max(runs, key=lambda run: run.points[-1].scores[keys[0]].mean)
    if warning := same_prompts_warning(choice, suites) or overlap_warning(choice, best):
        print_warning(
            console, warning, f"hold out other prompts for a suite named {REPORTS}, or name one with --report"
        )
    console.print(_table(runs, last, best, run_set))
    verdict = _verdict(runs, last, best)
    console.print(verdict, markup=False, highlight=False)
    facts = {"chooses": "/".join(keys[0]), "reports": "/".join(keys[-1]), "best": best.name, "verdict": verdict}
    write_atomically(run_set.path / CHOICE, json.dumps(facts, indent=1) + "\n")
    target = run_set.path / "sweep.png"
    _figure(runs, last, best).savefig(target, dpi=130)
    console.print(f"plot: {target}", markup=False, highlight=False)


def _table(runs: Sequence[Run], last: Last, best: Run, run_set: RunSet) -> RichTable:
    keys = list(last[best.name])
    several = any(len(run.members) > 1 for run in runs)
    columns = [escape("/".join(key)) for key in keys]
    table = RichTable(title="points, at their last evaluation, 95 % intervals")
    for name in ("point", "state"):
        table.add_column(name, overflow="fold")
    for name, what in zip(columns, ("chooses", "reports"), strict=False):
        table.add_column(f"{name} ({what if len(columns) > 1 else 'chooses and reports'})", justify="right")
    methods: list[str | None] = []
    for run in sorted(runs, key=lambda run: -run.points[-1].scores[keys[0]].mean):
        intervals = [last[run.name][key] for key in keys]
        methods += [interval.method for interval in intervals]
        style = "bold" if run is best else None
        table.add_row(escape(run.name), escape(run.state), *map(with_interval, intervals), style=style)
    for name, state in run_set.states().items():
        if name not in last:
            table.add_row(escape(name), state, *["–"] * len(keys))
    table.caption = interval_note(methods, seeds=several)
    return table


def _verdict(runs: Sequence[Run], last: Last, best: Run) -> str:
    """The best point, what it scores where it was not chosen, and which other points are not significantly worse."""
    keys = list(last[best.name])
    score = "/".join(keys[-1])
    text = f"best by {'/'.join(keys[0])}: {best.name}; on {score} it has {with_interval(last[best.name][keys[-1]])}"
    others = [run for run in runs if run is not best]
    close = [run.name for run in others if _difference(best, run, keys[0], len(others)).low <= 0]
    if close:
        text += f"\nnot significantly worse (95 %, Bonferroni over {len(others)}): {', '.join(close)}"
    return text


def _difference(best: Run, other: Run, key: Key, comparisons: int) -> Interval:
    """The best point's score minus the other's, simultaneous with the other comparisons; over prompts alone if one has a
    single seed.
    """
    level = 1 - 0.05 / comparisons
    first, second = (run.by_seed(run.points[-1])[key] for run in (other, best))
    a, b = mean_over_seeds(first), mean_over_seeds(second)
    common = [prompt for prompt in a if prompt in b]
    interval = paired_difference([a[p] for p in common], [b[p] for p in common], level=level)
    return widened(interval, difference_errors(first, second), level)


def _figure(runs: Sequence[Run], last: Last, best: Run) -> Any:
    """The points' scores with their intervals, the best at the top."""
    from matplotlib.figure import Figure

    keys = list(last[best.name])
    ordered = sorted(runs, key=lambda run: run.points[-1].scores[keys[0]].mean)
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(ordered)), layout="constrained")
    axis = figure.subplots()
    for number, key in enumerate(keys):
        intervals = [last[run.name][key] for run in ordered]
        places = [i - 0.15 * number for i in range(len(ordered))]
        means = [interval.mean for interval in intervals]
        errors = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
        axis.errorbar(means, places, xerr=errors, fmt="o", color=COLOURS[number], label="/".join(key), capsize=3)
    axis.set_yticks(range(len(ordered)), [f"{run.name} (best)" if run is best else run.name for run in ordered])
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("points of the sweep, 95 % intervals")
    return figure
