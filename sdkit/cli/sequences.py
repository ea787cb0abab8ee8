"""What `sdkit train`, `validate` and `plan` do with a sequence file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from attrs import evolve

from sdkit.cli.checking import make_console, placing, print_problems
from sdkit.language.errors import UnreadableInput, counted
from sdkit.stdout import is_first_rank


def check_sequence(path: Path, overrides: Sequence[str] | None) -> Any:
    """Load and check a sequence file; print its problems, and exit with code 1 if there are errors."""
    from sdkit.language.sequences import load_sequence

    sequence = load_sequence(path, overrides or ())
    if not sequence.ok or is_first_rank():
        print_problems([sequence], "text")
    if not sequence.ok:
        raise typer.Exit(1)
    return sequence


def with_first_rows(path: str, overrides: Sequence[str], *, strict: bool = False) -> tuple[Any, list[str]]:
    """The checked sequence file, with the problems of its stages' first rows, and what it does."""
    from sdkit.language.sequences import describe, load_sequence
    from sdkit.train.first_row import check_first_rows

    sequence = load_sequence(path, overrides)
    rows = [check_first_rows(stage.checked) for stage in sequence.stages if sequence.ok]
    problems = tuple(dict.fromkeys([*sequence.problems, *(p for each in rows for p in each.problems)]))
    if strict:
        problems = tuple(evolve(problem, severity="error") for problem in problems)
    sequence = evolve(sequence, problems=problems)
    return sequence, describe(sequence) if sequence.ok else []


def report_stages(sequence: Any, shown: int) -> None:
    """Load and check all rows of every stage of a checked sequence file, and show the prompts of `shown` of each."""
    from sdkit.train.data_report import report_data

    console = make_console()
    for stage in sequence.stages:
        console.print(f"stage {stage.name}:", markup=False, highlight=False)
        with placing(stage.checked):
            report_data(stage.spec, stage.checked.base, console, shown)


def plan_sequence(path: Path, overrides: Sequence[str] | None) -> Any:
    """Print the stages, the plan of each, and their sum; returns the checked sequence file."""
    from sdkit.api import plan_spec
    from sdkit.language.sequences import describe
    from sdkit.plan.text import render_plan

    sequence = check_sequence(path, overrides)
    plans: list[Any] = [plan_spec(stage.spec, stage.checked.base) for stage in sequence.stages]
    lines = describe(sequence)
    for stage, plan in zip(sequence.stages, plans, strict=True):
        lines += ["", f"stage {stage.name}", render_plan(stage.spec, plan)]
    typer.echo("\n".join([*lines, "", "the sequence:", *(f"  {line}" for line in _totals(sequence.stages, plans))]))
    return sequence


def _totals(stages: Sequence[Any], plans: Sequence[Any]) -> list[str]:
    """Steps, evaluations and the time of all stages."""
    from sdkit.sets.seeds import run_hours

    lines = []
    if all(plan.steps is not None for plan in plans):
        lines.append(f"{sum(plan.steps for plan in plans)} rollout batches in {counted(len(plans), 'stage')}")
    suites = len(stages[0].spec.suites)
    lines.append(f"{counted(suites, 'suite')}, evaluated at the start and the end of every stage")
    hours = [known for plan in plans if (known := run_hours(plan)) is not None]
    if len(hours) == len(plans):
        lines.append(f"{sum(hours):.1f} h, without evaluation")
    else:
        lines.append("time: unknown; an estimate needs machine.accelerator and the number of steps of every stage")
    return lines


def rehearse_stages(path: Path, overrides: Sequence[str] | None) -> None:
    """Plan the sequence, then check rows and rewards of every stage and smoke-run it."""
    from sdkit.cli.specs import rehearse

    sequence = plan_sequence(path, overrides)
    console = make_console()
    for stage in sequence.stages:
        console.print(f"stage {stage.name}:", markup=False, highlight=False)
        rehearse(stage.checked, console)


def train_stages(
    path: Path,
    overrides: Sequence[str],
    seeds: Sequence[int],
    to: Path | None,
    *,
    processes: int | None,
    parallel: int,
    accept: Sequence[str],
    resume: bool,
    overwrite: bool,
) -> None:
    """Run a sequence file: every stage as a run of its own, in a process of its own; with seeds, once for each."""
    from sdkit.cli.sets import check_parallel
    from sdkit.sets.runner import Options
    from sdkit.sets.sequences import seeds_of_sequence, sequence_set, train_seeds, train_sequence

    sequence = check_sequence(path, overrides)
    first = sequence.stages[0].spec
    folder = to or Path(first.output.folder) / path.stem
    options = Options(
        processes=processes,
        slots=check_parallel(first, parallel, processes),
        stop_at_failure=not seeds,
        arguments=[f"--changed-{kind}" for kind in accept],
    )
    settings = {"resume": resume, "overwrite": overwrite}
    if seeds:
        return train_seeds(
            seeds_of_sequence(sequence, overrides, seeds, folder), make_console(log=True), options, **settings
        )
    return train_sequence(sequence_set(sequence, overrides, folder), make_console(log=True), options, **settings)


def stage_to_train(path: Path, overrides: Sequence[str] | None, name: str, to: Path | None) -> tuple[Any, Path, Any]:
    """The checked spec of one stage, its run directory, and what it takes over besides weights (None: nothing).

    A later stage starts from the model of the one before.

    Raises UnreadableInput if there is no such stage, or the one before it has no model yet.
    """
    from sdkit.language.sequences import is_sequence
    from sdkit.runs.directory import trained_model

    if not is_sequence(path):
        raise UnreadableInput(f"{path} has no stages", hint="--stage needs a sequence file")
    sequence = check_sequence(path, overrides)
    stage = sequence.stage(name)
    folder = to or Path(stage.spec.output.folder) / path.stem / name
    position, before = sequence.stages.index(stage), None
    if position:
        before = folder.parent / sequence.stages[position - 1].name
        model = trained_model(before).resolve()
        stage = check_sequence(path, [*(overrides or ()), f"model.path={model}"]).stage(name)
    if not sequence.spec.carry_over:
        return stage.checked, folder, None
    from sdkit.train.carried import Carried

    return stage.checked, folder, Carried(parts=sequence.spec.carry_over, before=before)
