"""`sdkit compare`: runs, settings, scores and verdicts as tables, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import UnreadableInput, shorten, spelled
from sdkit.runs import retention
from sdkit.runs.compare import (
    BUDGET_TOLERANCE,
    CommonBudget,
    Difference,
    common_budget,
    differences,
    differing,
    differing_evaluation,
    differing_reward_code,
    differing_settings,
    same_kind,
    score_keys,
)
from sdkit.runs.evaluations import FEW_PROMPTS_ADVICE, Key, few_prompts_warning, interval_note, signed, with_interval
from sdkit.runs.history import AXES, Axis, Run
from sdkit.runs.plot import check_plot_path, plot_runs
from sdkit.runs.score_tables import turn_rows, turns_table
from sdkit.runs.seed_runs import read_runs
from sdkit.stdout import print_warning

SETTINGS_SHOWN = 30
MISSING = "[dim]–[/]"
"""What a table shows where a run does not have a setting."""


def compare(paths: Sequence[Path], console: Console, target: Path, axis: Axis, score: str | None) -> None:
    """Print and plot the runs in these folders; `axis` is the budget at which they are compared.

    Raises UnreadableInput if a folder holds no evaluated run, no run has the score, or the plot cannot be written.
    """
    check_plot_path(target)
    runs = read_runs(paths)
    keys = score_keys(runs, score)
    console.print(_runs_table(runs))
    if len(runs) > 1:
        _print_settings(runs, keys, console)
    console.print(_scores_table(runs, keys))
    turns = {member.name: rows for run in runs for member in run.members if (rows := turn_rows(*member.ends))}
    if turns:
        console.print(turns_table(turns))
    retentions = {run.name: figures for run in runs if (figures := retention.of_run(run))}
    if retentions:
        several = any(len(run.members) > 1 for run in runs)
        console.print(retention.retention_table(retentions, seeds=several))
        if pairs := retention.differences(runs):
            console.print(retention.differences_table(pairs))
    if score is None:  # what must not be lost has its own table
        panel = retention.panel_suites(runs)
        keys = [key for key in keys if key[0] not in panel]
    sizes = {key[0]: i.n for run in runs for key, i in run.points[-1].scores.items() if key in keys}
    if few := few_prompts_warning(sizes):
        print_warning(console, few, FEW_PROMPTS_ADVICE)
    if len(runs) > 1:
        _print_verdicts(runs, keys, axis, console)
    main = {run.main_score(suite) for run in runs for suite in run.suites}
    shown = [key for key in keys if score is not None or (key[0], key[2]) in main]
    try:
        plot_runs(runs, shown, target, retentions)
    except OSError as error:
        raise UnreadableInput(f"cannot write {target}: {error.strerror}") from None
    console.print(f"plot: {target}", highlight=False)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with columns aligned to the left and to the right."""
    table = Table(title=title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _runs_table(runs: Sequence[Run]) -> Table:
    table = _table(
        "runs, at their last evaluation",
        ("run", "state"),
        ("evaluations", "steps", "generated tokens", "training time, s"),
    )
    for run in runs:
        last = run.points[-1]
        spent = f"{last.step:,}", f"{last.tokens:,.0f}", f"{last.seconds:,.0f}"
        table.add_row(escape(run.name), escape(run.state), str(len(run.points)), *spent)
    return table


def _print_settings(runs: Sequence[Run], keys: Sequence[Key], console: Console) -> None:
    paths, origins = differing_settings(runs), differing([run.origins for run in runs])
    if not paths:
        console.print("the specs are the same", highlight=False)
    rows = [(spelled(path), [run.settings for run in runs], path) for path in paths]
    rows += [(f"{spelled(path)} (origin)", [run.origins for run in runs], path) for path in origins]
    if rows:
        shown = [
            (name, [_cell(values, path) for values in settings]) for name, settings, path in rows[:SETTINGS_SHOWN]
        ]
        console.print(differences_table("what differs", [run.name for run in runs], shown))
    if len(rows) > SETTINGS_SHOWN:
        console.print(f"… and {len(rows) - SETTINGS_SHOWN} more", highlight=False)
    if any(path[0] in ("code", "accepted_changes") for path in origins):
        console.print("the runs' code differs; each run's copy is in its code/", highlight=False)
    if affected := [*differing_evaluation(paths, keys), *differing_reward_code(runs, origins, keys)]:
        what = f"the runs' evaluations differ ({spelled(affected[0])})"
        print_warning(console, f"{what}, so their scores may not be comparable")


def differences_table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Returns a table of what differs: in each row a setting, and its value for each of the runs `names`, as markup."""
    table = _table(title, ("setting", *map(escape, names)), ())
    for setting, cells in rows:
        table.add_row(escape(setting), *cells)
    return table


def _cell(settings: Mapping[SpecPath, object], path: SpecPath) -> str:
    return escape(shorten(settings[path], 32)) if path in settings else MISSING


def _scores_table(runs: Sequence[Run], keys: Sequence[Key]) -> Table:
    """Each run's first and last scores, and the paired change between them."""
    table = _table(
        "held-out scores, 95 % intervals",
        ("suite", "decoding", "score", "run"),
        ("start", "end", "change", "95 % interval", "n"),
    )
    methods: list[str | None] = []
    changes = [run.changes(keys) for run in runs]
    for key in keys:
        for place, (run, of_run) in enumerate(zip(runs, changes, strict=True)):
            if key not in of_run:
                continue
            first, last, change = of_run[key]
            names = key if place == 0 else ("", "", "")
            values = with_interval(first), with_interval(last), *signed(change)
            table.add_row(*names, escape(run.name), *values, str(change.n))
            methods += [first.method, last.method, change.method]
    table.caption = interval_note(methods, seeds=any(len(run.members) > 1 for run in runs))
    return table


def _print_verdicts(runs: Sequence[Run], keys: Sequence[Key], axis: Axis, console: Console) -> None:
    pairs = [(a, b, common_budget(a, b, axis) if same_kind(a, b) else None) for a, b in combinations(runs, 2)]
    all_differences = differences([budget for _, _, budget in pairs if budget], keys)
    for first, second, budget in pairs:
        of_pair = [d for d in all_differences if d.budget is budget]
        if not same_kind(first, second):
            console.print(_one_and_several(first, second), markup=False, highlight=False)
        elif budget is None:
            console.print(_no_common_budget(first, second, axis), highlight=False)
        elif not of_pair:
            console.print(f"{first.name} and {second.name} have no score in common", markup=False)
        else:
            console.print(_differences_table(budget, of_pair, axis))
            for difference in of_pair:
                score = escape(" ".join(difference.key))
                console.print(f"  {score}: {escape(difference.verdict())}", highlight=False)
    if all_differences:
        console.print(_significance_note(all_differences), style="dim", highlight=False)


def _differences_table(budget: CommonBudget, differences: Sequence[Difference], axis: Axis) -> Table:
    a, b = budget.first.name, budget.second.name
    table = _table(
        escape(f"{a} − {b}, {_budget_text(budget, axis)}"),
        ("suite", "decoding", "score"),
        (escape(a), escape(b), "difference", "interval", "prompts"),
    )
    for difference in differences:
        intervals = [point.scores.get(difference.key) for point in budget.points]
        means = [f"{interval.mean:.3f}" if interval else "–" for interval in intervals]
        n, m = difference.sizes
        prompts = f"{n} paired" if difference.paired else f"{n} and {m}, not the same"
        prompts += _seeds_text(budget)
        table.add_row(*difference.key, *means, *signed(difference.interval), prompts)
    return table


def _seeds_text(budget: CommonBudget) -> str:
    """How many seeds two runs have, and whether they are paired; empty for single runs."""
    first, second = budget.first.seeds, budget.second.seeds
    if len(first) == len(second) == 1:
        return ""
    return f" × {len(first)} seeds" if first == second else f" × seeds {len(first)} and {len(second)}, not the same"


def _budget_text(budget: CommonBudget, axis: Axis) -> str:
    """The budget at which two runs are compared, and how much each spent in the end."""
    spent = [point.at(axis) for point in budget.points]
    ends = [run.points[-1].at(axis) for run in (budget.first, budget.second)]
    texts = [f"{x:,.0f}" + (f" (of {end:,.0f})" if end > x else "") for x, end in zip(spent, ends, strict=True)]
    steps = " and ".join(str(point.step) for point in budget.points)
    text = f"after {' and '.join(texts)} {AXES[axis]}"
    return text if axis == "steps" else f"{text} (steps {steps})"


def _no_common_budget(first: Run, second: Run, axis: Axis) -> str:
    evaluations = [
        f"{run.name} after {', '.join(f'{p.at(axis):,.0f}' for p in run.points)}" for run in (first, second)
    ]
    return escape(
        f"{first.name} and {second.name}: no verdict, no two evaluations within {BUDGET_TOLERANCE - 1:.0%} of each other in "
        f"{AXES[axis]} ({'; '.join(evaluations)}); `evaluation.every` makes more of them"
    )


def _one_and_several(first: Run, second: Run) -> str:
    single, several = sorted((first, second), key=lambda run: len(run.members))
    return (
        f"{first.name} and {second.name}: no verdict, {single.name} is one run and {several.name} has "
        f"{len(several.members)} seeds; train {single.name} with --seeds, too"
    )


def _significance_note(differences: Sequence[Difference]) -> str:
    methods = ", ".join(dict.fromkeys(str(difference.interval.method) for difference in differences))
    text = (
        f"the intervals of differences hold simultaneously with 95 % probability (Bonferroni over {len(differences)}, "
        f"{methods}); a difference is significant if its interval excludes 0 and a permutation test agrees"
    )
    seeds = {len(run.members) for d in differences for run in (d.budget.first, d.budget.second)}
    if seeds == {1}:
        return text + ". One run per setting says nothing about other seeds."
    few = " With 2 seeds an interval can be wide: train 3 to 5." if 2 in seeds else ""
    return text + f". The intervals count prompts and seeds, as random effects that cross.{few}"
