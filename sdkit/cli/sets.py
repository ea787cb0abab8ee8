"""Commands on sets of runs: several seeds of a spec, and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.cli.app import RUNNING, app
from sdkit.cli.checking import check_spec, make_console, print_problems
from sdkit.cli.options import (
    ChangedCode,
    ChangedModels,
    Overrides,
    Overwrite,
    Parallel,
    Processes,
    Resume,
    RunPath,
    Seeds,
    accepted,
    check_options,
)
from sdkit.language.errors import UnreadableInput, counted


def parsed_seeds(text: str | None) -> tuple[int, ...]:
    """The seeds of `--seeds`; empty without it.  Raises UnreadableInput."""
    from sdkit.sets.seeds import parse_seeds

    return () if text is None else parse_seeds(text)


def check_run_file(spec: Path, overrides: Sequence[str], seeds: Sequence[int]) -> Any:
    """Check a run file, for the first of the seeds if there are any.  Exits as `check_spec` does.

    With seeds, no override may give training.seed; the value in the file does not count.
    """
    from sdkit.sets.seeds import first_overrides

    refuse_second_seed(spec, overrides, seeds)
    return check_spec(spec, first_overrides(overrides, seeds), run_file=True)


def refuse_second_seed(spec: Path, overrides: Sequence[str], seeds: Sequence[int]) -> None:
    """Print a problem at the override, and exit with code 1, if one gives training.seed beside `--seeds`."""
    from attrs import evolve

    from sdkit.language.errors import COMMAND_LINE, Place, Problem
    from sdkit.language.load import load_spec
    from sdkit.sets.seeds import SEED_KEY

    doubled = [i for i, text in enumerate(overrides, 1) if text.partition("=")[0] == SEED_KEY]
    if seeds and doubled:
        checked = load_spec(spec, overrides)
        place = Place(COMMAND_LINE, doubled[0], 1, len(overrides[doubled[0] - 1]))
        message = f"{SEED_KEY} is given here and by --seeds"
        problem = Problem(("training", "seed"), message, "override", "leave one of them out", place)
        print_problems([evolve(checked, problems=(*checked.problems, problem))], "text")
        raise typer.Exit(1)


def check_parallel(spec: Any, parallel: int, processes: int | None) -> list[Any]:
    """The environments of runs at the same time.  Raises UnreadableInput if they cannot run so."""
    from sdkit.language.specs import VllmServerBackend
    from sdkit.plan.plan import prompts_per_rank
    from sdkit.sets.slots import make_slots

    if parallel > 1 and isinstance(spec.rollout.backend, VllmServerBackend):
        raise UnreadableInput(
            "runs at the same time cannot share rollout servers, which hold the weights of one run",
            hint="leave --parallel out, or use rollout.backend=vllm",
        )
    prompts_per_rank(spec, processes or 1)
    return make_slots(parallel, processes or 1)


def train_seeds(
    checked: Any,
    spec: Path,
    overrides: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    accept: Sequence[str],
    processes: int | None,
    parallel: int,
) -> None:
    """Train a checked spec with each seed, and compare the runs."""
    from sdkit.runs.run_sets import open_set
    from sdkit.sets.runner import Options, run_members, train_command
    from sdkit.sets.seeds import seeds_set

    slots = check_parallel(checked.spec, parallel, processes)
    run_set = seeds_set(checked.spec, spec, overrides, seeds, folder)
    open_set(run_set, resume=resume, overwrite=overwrite)
    options = Options(processes=processes, slots=slots, arguments=[f"--changed-{name}" for name in accept])
    console = make_console(log=True)
    run_members(run_set, lambda member: train_command(run_set, member, options), console, options)
    show_set(folder, checked.spec)


def evaluate_set(folder: Path, overrides: Sequence[str], to: Path | None, format: str, processes: int | None) -> None:
    """Evaluate the models of several seeds, and print their means; `to` gets a folder for each and the means."""
    import contextlib
    import json
    import tempfile

    from sdkit.runs.run_sets import read_set
    from sdkit.sets import evaluate

    run_set = read_set(folder)
    evaluate.check_seeds(run_set)
    console = make_console(log=True, stderr=format == "json")
    with contextlib.ExitStack() as stack:
        if to and (to.exists() or to.is_symlink()):
            raise UnreadableInput(f"{to} exists", hint="name another with --to")
        target = to or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        intervals = evaluate.evaluate_seeds(run_set, overrides, processes, target, console)
        facts = evaluate.report(run_set, intervals)
        if to:
            evaluate.write_report(to, facts)
            console.print(f"evaluation: {to}", markup=False, highlight=False)
    if format == "json":
        typer.echo(json.dumps(facts, indent=2))


def show_set(folder: Path, spec: Any) -> None:
    """Print and plot the scores of a set of runs, if they were evaluated."""
    if spec.evaluation is not None:
        from sdkit.runs.compare_text import compare

        compare([folder], make_console(), folder / "scores.png", "tokens", None)
    typer.echo(f"set of runs: {folder}")


Over = Annotated[
    list[str] | None,
    typer.Option("--over", metavar="KEY=V,V,…", help="A key and its values; several span a grid.", show_default=False),
]
SweepFolder = Annotated[
    Path | None, typer.Option("--to", help="Folder of the sweep (default: runs/NAME-sweep).", show_default=False)
]
Choose = Annotated[
    str | None,
    typer.Option(
        "--choose",
        metavar="SUITE",
        help="The suite that chooses the best point (default: validation, or the first).",
        show_default=False,
    ),
]
Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="SUITE",
        help="The suite on which its score is reported (default: test, or the next one).",
        show_default=False,
    ),
]
PrintCommands = Annotated[
    bool,
    typer.Option(
        "--print-commands",
        help="Print the command of each point, one a line, for the job array of a cluster; "
        "`--resume` prints the table when they are done.",
    ),
]


@app.command(
    rich_help_panel=RUNNING,
    epilog="Examples: `sdkit sweep specs/sdft.yaml --over optimizer.lr=1e-5,3e-5`, "
    "`sdkit sweep specs/sdft.yaml --over optimizer.lr=1e-5,3e-5 --over losses.distil.divergence=forward_kl,jsd --seeds 0,1,2 "
    "--dry-run`",
)
def sweep(
    spec: RunPath,
    overrides: Overrides = None,
    over: Over = None,
    to: SweepFolder = None,
    seeds: Seeds = None,
    choose: Choose = None,
    report: Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan every point; train nothing.")] = False,
    print_commands: PrintCommands = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    changed_code: ChangedCode = False,
    changed_models: ChangedModels = False,
    processes: Processes = None,
    parallel: Parallel = 1,
) -> None:
    """Train a spec at every point of a grid, and choose the best by a held-out suite.

    Checks and plans all points first.  The folder holds a run directory, or one of several seeds, for each point.
    """
    check_options(resume, overwrite, accept := accepted(code=changed_code, models=changed_models))
    if not over:
        raise typer.BadParameter("--over is missing: name a key and its values, KEY=V,V")
    from sdkit.sets import sweep as sweeping
    from sdkit.sets.grid import make_points, parse_key

    numbers, keys = parsed_seeds(seeds), [parse_key(text) for text in over]
    checked = _check_points(spec, overrides or [], make_points(keys), numbers)
    first = next(iter(checked.values()))
    choice = sweeping.choose_suites(first.spec, choose, report)
    plans = {point.name: (each.spec, each.base) for point, each in checked.items()}
    _print_grid(plans, numbers, choice, processes, parallel)
    if dry_run:
        return None
    folder = to or Path(first.spec.output.folder) / f"{spec.stem}-sweep"
    run_set = sweeping.sweep_set(checked, spec, overrides or [], keys, numbers, folder)
    options = {"processes": processes, "seeds": numbers, "arguments": [f"--changed-{name}" for name in accept]}
    settings = {"resume": resume, "overwrite": overwrite}
    if print_commands:
        return _print_commands(run_set, options, **settings)
    slots = check_parallel(first.spec, parallel, processes)
    _run_sweep(run_set, options | {"slots": slots}, **settings)
    sweeping.report_sweep(run_set, choice, first.spec.suites, make_console())
    return typer.echo(f"sweep: {folder}")


def _check_points(spec: Path, overrides: Sequence[str], points: Sequence[Any], seeds: Sequence[int]) -> Any:
    """The checked spec of every point, after printing all problems of all points.  Exits with code 1 if there are errors."""
    from sdkit.sets.sweep import check_points, describe_problems

    first = [*overrides, *points[0].overrides]
    refuse_second_seed(spec, first, seeds)
    checked = check_points(spec, overrides, points, seeds)
    if problems := describe_problems(checked):
        typer.echo(problems, err=True)
    if not all(each.ok for each in checked.values()):
        raise typer.Exit(1)
    check_spec(spec, first, run_file=True, warn=False)  # raises for a method page
    return checked


def _print_grid(plans: Any, seeds: Sequence[int], choice: Any, processes: int | None, parallel: int) -> None:
    """Plan every point, and print their number, the time of all, and which suites choose and report."""
    from sdkit.api import plan_spec
    from sdkit.plan.plan import prompts_per_rank
    from sdkit.sets.seeds import run_hours
    from sdkit.sets.sweep import same_prompts_warning
    from sdkit.stdout import print_warning

    console, total, known = make_console(), 0.0, True
    lines = []
    for name, (spec, base) in plans.items():
        prompts_per_rank(spec, processes or 1)
        plan: Any = plan_spec(spec, base)
        hours = run_hours(plan)
        total, known = total + (hours or 0.0) * max(1, len(seeds)), known and hours is not None
        steps = f"{plan.steps} steps" if plan.steps is not None else f"{spec.training.epochs:g} epochs"
        peak = f", {plan.peak_gib:.1f} GiB per rank" if plan.peak_gib else ""
        lines.append(f"  {name}: {steps}{peak}" + (f", {hours:.1f} h" if hours is not None else ""))
    runs = len(plans) * max(1, len(seeds))
    each = f" × {counted(len(seeds), 'seed')} = {counted(runs, 'run')}" if seeds else ""
    time = f"{total / parallel:.1f} h in all, without evaluation" if known else "time unknown: see machine.accelerator"
    lines = [f"sweep: {counted(len(plans), 'point')}{each}, {time}", *lines]
    lines.append(f"chosen by suite {choice.chooses}, reported on suite {choice.reports}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    spec = next(iter(plans.values()))[0]
    if warning := same_prompts_warning(choice, spec.suites):
        print_warning(console, warning, "hold out other prompts for a suite named test, or name one with --report")


def _print_commands(run_set: Any, options: Any, *, resume: bool, overwrite: bool) -> None:
    """Print a shell command for each unfinished point; the folder has the manifest, so `--resume` can read the results."""
    import shlex

    from sdkit.runs.run_sets import is_set, open_set
    from sdkit.sets.runner import Options, train_command

    open_set(run_set, resume=resume or (is_set(run_set.path) and not overwrite), overwrite=overwrite)
    for member in run_set.unfinished:
        typer.echo(shlex.join(["sdkit", *train_command(run_set, member, Options(**options))[3:]]))
    typer.echo("when they are done, the same command with --resume prints the table", err=True)


def _run_sweep(run_set: Any, options: Any, *, resume: bool, overwrite: bool) -> None:
    from sdkit.runs.run_sets import open_set
    from sdkit.sets.runner import Options, run_members, train_command

    open_set(run_set, resume=resume, overwrite=overwrite)
    chosen = Options(**options)
    run_members(run_set, lambda member: train_command(run_set, member, chosen), make_console(log=True), chosen)
