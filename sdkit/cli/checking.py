"""Checks the spec that a command is given, prints its problems, and adds file and line to errors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from sdkit.language.errors import SdkitError
from sdkit.stdout import TimestampedStream, is_first_rank


def check_spec(
    path: Path, overrides: Sequence[str] | None, *, run_file: bool = False, base: Path | None = None, warn: bool = True
) -> Any:
    """Load and check a spec; print its problems, and exit with code 1 if there are errors.

    Raises UnreadableInput if `run_file` is required and this is a method page, and for a sequence file.
    """
    from sdkit.language.errors import UnreadableInput
    from sdkit.language.load import load_spec
    from sdkit.language.sequences import is_sequence

    if base is None and is_sequence(path):  # what a run has resolved is never one
        raise UnreadableInput(
            f"{path} is a sequence file, and this command reads one run",
            hint="name the run file of a stage; `sdkit train`, `validate`, `plan` and `fmt` read sequence files",
        )
    checked = load_spec(path, overrides or (), base=base)
    if not checked.ok or (is_first_rank() and warn):
        print_problems([checked], "text")
    if not checked.ok:
        raise typer.Exit(1)
    if run_file and checked.kind != "run":
        raise UnreadableInput(
            f"{path} is a method page",
            hint="a run file names it: `method: NAME` or `method: ./page.yaml`, then model, data, …",
        )
    return checked


def check_run(run: Path, overrides: Sequence[str] = (), *, fixed: Sequence[str] = ()) -> tuple[Any, Path]:
    """Check a run's resolved spec; return it and the folder that its paths start from.

    `overrides` are the user's, `fixed` the command's own.  Prints only warnings that the former cause: the others were
    printed when the run began, and many are about defaults that the resolved spec spells out.  Raises and exits as
    `check_spec` does.
    """
    from attrs import evolve

    from sdkit.language.load import load_spec
    from sdkit.runs.directory import MARK, origin

    base = Path(origin(run)["base"])
    checked = check_spec(run / MARK, [*fixed, *overrides], run_file=True, base=base, warn=False)
    if overrides and checked.problems and is_first_rank():
        before = load_spec(run / MARK, fixed, base=base).problems
        new = tuple(problem for problem in checked.problems if problem not in before)
        print_problems([evolve(checked, problems=new)], "text")
    return checked, base


def check_spec_or_run(path: Path, overrides: list[str] | None, *, run_file: bool = False) -> Any:
    """Check a spec, or the resolved spec of a run directory.  Raises and exits as `check_spec` does."""
    if path.is_dir():
        return check_run(path, overrides or ())[0]
    return check_spec(path, overrides, run_file=run_file)


@contextlib.contextmanager
def placing(checked: Any) -> Iterator[None]:
    """Add to an error that names a key of the spec the file and line where the key is written."""
    try:
        yield
    except SdkitError as error:
        if error.path:
            place = checked.loaded.place(error.path)
            if error.place is None:
                error.place = place
            else:  # a line of the user's own code
                error.hint = "\n  = ".join(filter(None, [error.hint, f"asked for at {place}"]))
        raise


def print_problems(specs: Sequence[Any], format: str) -> None:
    """Print every problem of these checked specs once: text to standard error, other formats to standard output."""
    # Run files that share a method page share its problems.
    problems = list(dict.fromkeys(p for checked in specs for p in checked.problems))
    if format == "text":
        from sdkit.language.errors import render

        if problems:
            texts = {name: text for checked in specs for name, text in checked.texts.items()}
            typer.echo(render(problems, texts), err=True)
        return
    from sdkit.language import formats

    write = {"json": formats.as_json, "github": formats.as_github, "sarif": formats.as_sarif}[format]
    if text := write(problems):
        typer.echo(text)


def print_source_problems(source: Any) -> None:
    """Print the YAML problems of one file to standard error."""
    from sdkit.language.errors import render

    typer.echo(render(source.problems, {source.name: source.text}), err=True)


def make_console(*, log: bool = False, stderr: bool = False) -> Any:
    """The console that a command prints to; on ranks other than the first it prints nothing.

    It is as wide as COLUMNS says, or else the terminal; elsewhere 140 characters.  `log`: outside of a terminal, every
    line begins with the time.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    terminal, columns = stream.isatty(), os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else None if terminal else 140
    file: Any = TimestampedStream(stream) if log and not terminal else stream
    return Console(width=width, file=file, quiet=not is_first_rank())
