"""`sdkit compare`: runs, settings, scores and verdicts as tables, and the picture beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdkit.runs.compare import (
    ALIKE,
    Difference,
    CommonBudget,
    differences,
    differing,
    differing_origins,
    keys_of,
    differing_evaluation,
    common_budgets,
)
from sdkit.runs.evaluations import Key, signed, with_interval
from sdkit.runs.plot import picture_of, plot_runs
from sdkit.runs.history import AXES, Axis, Run, read_runs
from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import UnreadableInput, shorten, spelled

SETTINGS_SHOWN = 30


def compare(
    paths: Sequence[Path], console: Console, target: Path, axis: Axis, score: str | None
) -> None:
    """Print and plot the runs in these folders; `axis` is the budget at which they are held against each other.

    Raises UnreadableInput where a folder holds no evaluated run, no run has the score, or the picture cannot be written.
    """
    picture_of(target)
    runs = read_runs(paths)
    keys = keys_of(runs, score)
    console.print(_budgets(runs))
    if len(runs) > 1:
        _settings(runs, keys, console)
    console.print(_scores(runs, keys))
    if len(runs) > 1:
        _verdicts(runs, keys, axis, console)
    head = runs[0].headline if score is None else keys[0]
    shown = [key for key in keys if (key[0], key[2]) == (head[0], head[2])]
    try:
        plot_runs(runs, shown, target)
    except OSError as error:
        raise UnreadableInput(f"cannot write {target}: {error.strerror}") from None
    console.print(f"plot: {target}", highlight=False)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _budgets(runs: Sequence[Run]) -> Table:
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


# ── settings ──────────────────────────────────────────────────────────────────────────────────


def _settings(runs: Sequence[Run], keys: Sequence[Key], console: Console) -> None:
    paths, origins = differing(runs), differing_origins(runs)
    if not paths:
        console.print("the specs are the same", highlight=False)
    rows = [(spelled(path), [run.settings for run in runs], path) for path in paths]
    rows += [(f"{spelled(path)} (origin)", [run.origins for run in runs], path) for path in origins]
    if rows:
        table = _table("what differs", ("setting", *(escape(run.name) for run in runs)), ())
        for name, held, path in rows[:SETTINGS_SHOWN]:
            table.add_row(escape(name), *(_shown(settings, path) for settings in held))
        console.print(table)
    if len(rows) > SETTINGS_SHOWN:
        console.print(f"… and {len(rows) - SETTINGS_SHOWN} more", highlight=False)
    if unlike := differing_evaluation(paths, keys):
        console.print(
            f"[yellow]warning[/]: the runs are not measured alike ({escape(spelled(unlike[0]))}), so their scores "
            "may not be of one kind",
            highlight=False,
        )


def _shown(settings: Mapping[SpecPath, object], path: SpecPath) -> str:
    return escape(shorten(settings[path], 32)) if path in settings else "[dim]–[/]"


# ── scores ────────────────────────────────────────────────────────────────────────────────────


def _scores(runs: Sequence[Run], keys: Sequence[Key]) -> Table:
    """Each run's own beginning and end, and the paired change between them."""
    table = _table(
        "held-out scores, 95 % intervals",
        ("suite", "decoding", "score", "run"),
        ("start", "end", "change", "95 % interval", "n"),
    )
    ends = [(run.evaluated(run.points[0]), run.evaluated(run.points[-1])) for run in runs]
    for key in keys:
        for place, (run, (start, end)) in enumerate(zip(runs, ends, strict=True)):
            if key not in start.scores or key not in end.scores:
                continue
            values = [with_interval(start.interval(key)), with_interval(end.interval(key))]
            change = end.difference(start, key)
            names = key if place == 0 else ("", "", "")
            table.add_row(*names, escape(run.name), *values, *signed(change), str(change.n))
    return table


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────


def _verdicts(runs: Sequence[Run], keys: Sequence[Key], axis: Axis, console: Console) -> None:
    pairs = common_budgets(runs, axis)
    found = differences([m for _, _, m in pairs if m], keys)
    for first, second, met in pairs:
        own = [d for d in found if d.meeting is met]
        if met is None:
            console.print(_never_met(first, second, axis), highlight=False)
        elif not own:
            console.print(f"{first.name} and {second.name} have no score in common", markup=False)
        else:
            console.print(_differences(met, own, axis))
            for each in own:
                where = " ".join(each.key)
                console.print(f"  {escape(where)}: {escape(each.verdict())}", highlight=False)
    if found:
        console.print(_how_sure(found), style="dim", highlight=False)


def _differences(met: CommonBudget, own: Sequence[Difference], axis: Axis) -> Table:
    a, b = met.first.name, met.second.name
    table = _table(
        escape(f"{a} − {b}, {_budget(met, axis)}"),
        ("suite", "decoding", "score"),
        (escape(a), escape(b), "difference", "interval", "prompts"),
    )
    for each in own:
        means = [point.scores.get(each.key) for point in met.points]
        values = [f"{mean.mean:.3f}" if mean else "–" for mean in means]
        n, m = each.sizes
        prompts = f"{n} paired" if each.paired else f"{n} and {m}, not the same"
        table.add_row(*each.key, *values, *signed(each.interval), prompts)
    return table


def _budget(met: CommonBudget, axis: Axis) -> str:
    """Where the two are compared, and how far each went on."""
    spent = [point.at(axis) for point in met.points]
    ends = [run.points[-1].at(axis) for run in (met.first, met.second)]
    texts = [
        f"{x:,.0f}" + (f" (of {end:,.0f})" if end > x else "")
        for x, end in zip(spent, ends, strict=True)
    ]
    steps = " and ".join(str(point.step) for point in met.points)
    told = f"after {' and '.join(texts)} {AXES[axis]}"
    return told if axis == "steps" else f"{told} (steps {steps})"


def _never_met(first: Run, second: Run, axis: Axis) -> str:
    found = [
        f"{run.name} after {', '.join(f'{p.at(axis):,.0f}' for p in run.points)}"
        for run in (first, second)
    ]
    return escape(
        f"{first.name} and {second.name}: no verdict, no two evaluations within {ALIKE - 1:.0%} of each other in "
        f"{AXES[axis]} ({'; '.join(found)}); `evaluation.every` makes more of them"
    )


def _how_sure(found: Sequence[Difference]) -> str:
    text = (
        f"intervals of differences hold all together with 95 % probability (Bonferroni over {len(found)}, "
        "bootstrap over prompts); a difference is told where its interval leaves out 0 and a permutation test agrees"
    )
    if not all(each.paired for each in found):
        text += "; where the prompts are not the same, each side is drawn by itself"
    return text + ". One run a setting says nothing of other seeds."
