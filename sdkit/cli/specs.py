"""Commands on specs: validate, show, plan, and a smoke run of a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.cli import completion, sequences
from sdkit.cli.app import CHECKING, app
from sdkit.cli.checking import check_spec, check_spec_or_run, make_console, placing, print_problems
from sdkit.cli.options import Format, Overrides, Seeds, SpecOrRun, SpecPath

_KINDS = {"run": "run file", "method": "method page", "sequence": "sequence file"}


@app.command(
    rich_help_panel=CHECKING,
    epilog="Examples: `sdkit validate specs/*.yaml --strict --format sarif`, "
    "`sdkit validate mine.yaml training.steps=20 --data 2`",
)
def validate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC... [KEY.PATH=VALUE]...",
            help="Run files or method pages, and overrides for all of them.",
            show_default=False,
            autocompletion=completion.specs_and_overrides,
        ),
    ],
    format: Format = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
    data: Annotated[
        int | None,
        typer.Option(
            "--data",
            help="Also load all rows, render and check the prompts as a run does, and show those of this many rows.",
            min=0,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check specs and the first row of their local data; print every problem at once, with file and line.

    Loads nothing heavy without `--data`.
    """
    paths, overrides = _split(words)
    from sdkit.language.sequences import CheckedSequence, is_sequence

    checked_specs = {
        path: (sequences.with_first_rows if is_sequence(path) else check_with_first_rows)(
            path, overrides, strict=strict
        )
        for path in paths
    }
    print_problems([checked for checked, _ in checked_specs.values()], format)
    for path, (checked, descriptions) in checked_specs.items():
        if checked.ok and format == "text":
            typer.echo(f"{path}: ok ({_KINDS[checked.kind]})")
            for line in descriptions:
                typer.echo(f"  {line}")
    if not all(checked.ok for checked, _ in checked_specs.values()):
        raise typer.Exit(1)
    if data is not None:
        for path, (checked, _) in checked_specs.items():
            if isinstance(checked, CheckedSequence):
                sequences.report_stages(checked, data)
            else:
                _check_data(path, overrides, data)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The specs and the overrides among the arguments."""
    from sdkit.language.errors import UnreadableInput

    paths = [word for word in words if "=" not in word or os.path.exists(word)]
    if not paths:
        raise typer.BadParameter("name a run file or a method page")
    for word in paths:
        if not os.path.exists(word) and _begins_with_a_key(word):
            raise UnreadableInput(
                f"{word} is neither a file nor an override of the form key.path=value",
                hint="example: optimizer.lr=1e-5",
            )
    return paths, [word for word in words if word not in paths]


def _begins_with_a_key(word: str) -> bool:
    from sdkit.language.introspection import keys_of
    from sdkit.language.specs import ExperimentSpec

    first = word.lstrip("+~").replace(":", ".").partition(".")[0]
    return first in keys_of(ExperimentSpec) and not word.endswith((".yaml", ".yml"))


def check_with_first_rows(path: str, overrides: list[str], *, strict: bool = False) -> tuple[Any, list[str]]:
    """The checked spec, with the problems of its data's first rows, and what these rows have."""
    from attrs import evolve

    from sdkit.language.load import load_spec, strictly
    from sdkit.train.first_row import check_first_rows

    checked = load_spec(path, overrides)
    first_rows = check_first_rows(checked)
    checked = evolve(checked, problems=(*checked.problems, *first_rows.problems))
    return strictly(checked) if strict else checked, first_rows.descriptions


def _check_data(path: str, overrides: list[str], shown: int) -> None:
    from sdkit.train.data_report import report_data

    checked = check_spec(Path(path), overrides, run_file=True, warn=False)
    with placing(checked):
        report_data(checked.spec, checked.base, make_console(), shown)


@app.command(
    rich_help_panel=CHECKING, epilog="Examples: `sdkit show specs/sdft.yaml optimizer.lr=1e-5`, `sdkit show runs/sdft`"
)
def show(spec: SpecOrRun, overrides: Overrides = None) -> None:
    """Print the resolved spec, each value with the file and line it comes from."""
    from sdkit.language.show import annotated

    typer.echo(annotated(check_spec_or_run(spec, overrides), show_paths=True))


@app.command(
    rich_help_panel=CHECKING,
    epilog="Examples: `sdkit plan specs/sdft.yaml --data 2`, `sdkit plan sdpo`, `sdkit plan runs/sdft`",
)
def plan(
    spec: SpecOrRun,
    overrides: Overrides = None,
    data: Annotated[
        int, typer.Option("--data", help="Show student and teacher prompt of this many rows, side by side.", min=0)
    ] = 0,
    seeds: Seeds = None,
) -> None:
    """Print what a run would do: roles, batches, memory, every derived value.  Loads no weights.

    For a method page: its objective, teacher and sampler.  For a sequence file: every stage, and the sum.
    """
    from sdkit.language.sequences import is_sequence

    if is_sequence(spec):
        sequence = sequences.plan_sequence(spec, overrides)
        return sequences.report_stages(sequence, data) if data else None
    checked = check_spec_or_run(spec, overrides, run_file=data > 0)
    print_plan(checked, seeds)
    if data:
        from sdkit.train.preview import preview

        with placing(checked):
            preview(checked.spec, checked.base, data, make_console())
    return None


def print_plan(checked: Any, seeds: str | None) -> None:
    """Print the plan of a checked run file, for the runs of `--seeds` too if given, or what a method page fixes of it."""
    from sdkit.api import plan_spec
    from sdkit.plan.plan import MethodPlan
    from sdkit.plan.text import render_method, render_plan
    from sdkit.sets.seeds import parse_seeds, plan_seeds

    the_plan = plan_spec(checked.spec, checked.base)
    if isinstance(the_plan, MethodPlan):
        return typer.echo(render_method(the_plan))
    typer.echo(render_plan(checked.spec, the_plan))
    return None if seeds is None else typer.echo(plan_seeds(parse_seeds(seeds), the_plan))


@app.command(rich_help_panel=CHECKING, epilog="Examples: `sdkit smoke specs/sdft.yaml`, `sdkit smoke sdft --steps 20`")
def smoke(
    spec: SpecPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2,
) -> None:
    """Take two real optimizer steps on a tiny random model: the same code as training, in seconds.

    Before, play the environment of a user's file with scripted turns.
    """
    checked = check_spec(spec, overrides)
    if checked.kind != "run":
        return smoke_spec(checked, steps)
    with placing(checked):
        played = _play_user_code(checked)
    smoke_spec(checked, steps)
    for line in _stand_ins(spec, checked.spec, played):
        typer.echo(f"  {line}")
    return None


def _stand_ins(path: Path, spec: Any, played: list[str]) -> Iterator[str]:
    """What a smoke run has tried, and what it has not."""
    from sdkit.language.specs import HostedEnvironment, environments_of

    rest = f"`sdkit validate {path} --data 2` reads your rows, `sdkit train {path} --dry-run` also calls your rewards"
    if played:
        yield f"played with scripted turns: {'; '.join(played)}"
    if any(environments_of(spec.environment, HostedEnvironment)):
        yield (
            f"rows, rewards and the environment's replies were stand-ins in the steps: {rest}, and plays your environment "
            "with your model's chat template"
        )
    else:
        yield f"rows and rewards were stand-ins: {rest}"


def _play_user_code(checked: Any) -> list[str]:
    """Play the environments of a user's file; returns what was played."""
    from sdkit.language.specs import CodeEnvironment, environments_of

    if not any(environments_of(checked.spec.environment, CodeEnvironment)):
        return []
    from sdkit.train.environment_trial import trial_of_spec

    return trial_of_spec(checked.spec, checked.base).play(make_console(), CodeEnvironment)


def smoke_spec(checked: Any, steps: int) -> None:
    """Smoke-run a checked spec and print its gradient norms."""
    from sdkit.train.smoke import smoke as run_smoke

    with placing(checked):
        lines = run_smoke(checked.spec, make_console(), steps, checked.base)
    norms = ", ".join(f"{line['grad_norm']:.3g}" for line in lines if "grad_norm" in line)
    typer.echo(f"{checked.loaded.name}: smoke run passed, gradient norms {norms}")


def rehearse(checked: Any, console: Any) -> None:
    """Check all rows of a run file, call its rewards, play its environments, and smoke-run it."""
    from sdkit.language.specs import HostedEnvironment
    from sdkit.train.data_report import report_data
    from sdkit.train.environment_trial import trial_of_run
    from sdkit.train.reward_trial import try_rewards

    with placing(checked):
        data = report_data(checked.spec, checked.base, console, 0)
        try:
            try_rewards(data, console)
            if data.environments:
                trial_of_run(data, checked.base).play(console, HostedEnvironment)
        finally:
            data.close()
    smoke_spec(checked, 2)
