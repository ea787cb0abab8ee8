"""Commands on specs: validate, show, plan, and a smoke run of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.cli import completion
from sdkit.cli.app import app
from sdkit.cli.checking import check_spec, make_console, placing, print_problems
from sdkit.cli.options import Format, Overrides, SpecPath


@app.command(epilog="Examples: `sdkit validate specs/*.yaml`, `sdkit validate specs/*.yaml --strict --format sarif`")
def validate(
    specs: Annotated[
        list[Path],
        typer.Argument(help="Run files or method pages.", show_default=False, autocompletion=completion.spec_files),
    ],
    format: Format = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
) -> None:
    """Check specs and print every problem at once, with file and line.  Loads nothing heavy."""
    from sdkit.language.load import load_spec, strictly

    loaded = {path: load_spec(path) for path in specs}
    if strict:
        loaded = {path: strictly(checked) for path, checked in loaded.items()}
    print_problems(list(loaded.values()), format)
    for path, checked in loaded.items():
        if checked.ok and format == "text":
            typer.echo(f"{path}: ok ({'run file' if checked.kind == 'run' else 'method page'})")
    if not all(checked.ok for checked in loaded.values()):
        raise typer.Exit(1)


@app.command(epilog="Example: `sdkit show specs/sdft.yaml optimizer.lr=1e-5`")
def show(spec: SpecPath, overrides: Overrides = None) -> None:
    """Print the resolved spec, each value with the file and line it comes from."""
    from sdkit.language.show import annotated

    typer.echo(annotated(check_spec(spec, overrides), show_paths=True))


@app.command(epilog="Examples: `sdkit plan specs/sdft.yaml --data 2`, `sdkit plan sdpo`")
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    data: Annotated[
        int, typer.Option("--data", help="Show student and teacher prompt of this many rows, side by side.", min=0)
    ] = 0,
) -> None:
    """Print what a run would do: roles, batches, memory, every derived value.  Loads no weights.

    For a method page: its objective, teacher and sampler.
    """
    from sdkit.api import plan_spec
    from sdkit.plan.plan import MethodPlan
    from sdkit.plan.text import render_method, render_plan

    checked = check_spec(spec, overrides, run_file=data > 0)
    the_plan = plan_spec(checked.spec, checked.base)
    if isinstance(the_plan, MethodPlan):
        return typer.echo(render_method(the_plan))
    typer.echo(render_plan(checked.spec, the_plan))
    if data:
        from sdkit.train.preview import preview

        with placing(checked):
            preview(checked.spec, checked.base, data, make_console())
    return None


@app.command(epilog="Examples: `sdkit smoke specs/sdft.yaml`, `sdkit smoke sdft --steps 20`")
def smoke(
    spec: SpecPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2,
) -> None:
    """Take two real optimizer steps on a tiny random model: the same code as training, in seconds."""
    checked = check_spec(spec, overrides)
    smoke_spec(checked, steps)


def smoke_spec(checked: Any, steps: int) -> None:
    """Smoke-run a checked spec and print its gradient norms."""
    from sdkit.train.smoke import smoke as run_smoke

    with placing(checked):
        lines = run_smoke(checked.spec, make_console(), steps, checked.base)
    norms = ", ".join(f"{line['grad_norm']:.3g}" for line in lines if "grad_norm" in line)
    typer.echo(f"{checked.loaded.name}: smoke run passed, gradient norms {norms}")
