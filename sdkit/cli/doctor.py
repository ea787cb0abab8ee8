"""The command that examines the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sdkit.cli import completion
from sdkit.cli.app import CHECKING, app
from sdkit.cli.checking import check_spec, make_console
from sdkit.cli.options import Overrides
from sdkit.language.errors import BadEnvironment, counted


@app.command(
    rich_help_panel=CHECKING, epilog="Examples: `sdkit doctor`, `sdkit doctor specs/sdft.yaml`, `sdkit doctor --json`"
)
def doctor(
    spec: Annotated[
        Path | None, typer.Argument(help="A run file.", show_default=False, autocompletion=completion.spec_files)
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
) -> None:
    """Check packages, GPUs, memory, disks and ports, and what a run file needs of them.  Code 4 if there is a problem."""
    checked = check_spec(spec, overrides, run_file=True) if spec else None
    from sdkit.doctor import examine
    from sdkit.doctor.findings import findings_table

    findings = examine(checked.spec, checked.base) if checked else examine()
    if as_json:
        typer.echo(json.dumps([each.as_dict() for each in findings], indent=1, ensure_ascii=False))
    else:
        make_console().print(findings_table(findings))
    problems = [each.check for each in findings if each.state == "problem"]
    if problems:
        raise BadEnvironment(f"{counted(len(problems), 'problem')}: {', '.join(dict.fromkeys(problems))}")
