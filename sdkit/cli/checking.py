"""Between an argument and a command: the spec is checked, its problems are printed, errors get their place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from sdkit.cli.app import FIRST
from sdkit.language.errors import SdkitError


def check_spec(
    path: Path,
    overrides: list[str] | None,
    *,
    run_file: bool = False,
    base: Path | None = None,
    warn: bool = True,
) -> Any:
    """The checked spec; prints its problems and exits with 1 where there are errors.

    Raises UnreadableInput where `run_file` is asked for and this is a method page.
    """
    from sdkit.language.errors import UnreadableInput
    from sdkit.language.load import load_spec

    checked = load_spec(path, overrides or (), base=base)
    if not checked.ok or (FIRST and warn):
        print_problems([checked], "text")
    if not checked.ok:
        raise typer.Exit(1)
    if run_file and checked.kind != "run":
        raise UnreadableInput(
            f"{path} is a method page",
            hint="a run file names it: `method: NAME` or `method: ./page.yaml`, then model, data, …",
        )
    return checked


def check_run(
    run: Path, overrides: list[str] | None = None, *, warn: bool = False
) -> tuple[Any, Path]:
    """The spec that a run was made of, and the folder its paths start from; its warnings were given when the run began.

    Raises and exits as `check_spec` does.
    """
    from sdkit.runs.directory import MARK, origin

    base = Path(origin(run)["base"])
    checked = check_spec(run / MARK, overrides, run_file=True, base=base, warn=warn)
    return checked, base


@contextlib.contextmanager
def placing(checked: Any) -> Iterator[None]:
    """What ends the command in here and blames a key of the spec says where that key is written."""
    try:
        yield
    except SdkitError as error:
        if error.path:
            written = checked.loaded.place(error.path)
            if error.place is None:
                error.place = written
            else:  # a line of the user's own code
                error.hint = "\n  = ".join(filter(None, [error.hint, f"asked for at {written}"]))
        raise


def print_problems(found: Sequence[Any], format: str) -> None:
    """Every problem of these specs once: text to standard error, `json` and `github` to standard output."""
    from sdkit.language import errors

    # Run files that share a method page share its problems.
    every = list(dict.fromkeys(p for checked in found for p in checked.problems))
    if format == "json":
        typer.echo(errors.as_json(every))
    elif every and format == "github":
        typer.echo(errors.as_github(every))
    elif every:
        texts = {name: text for checked in found for name, text in checked.texts.items()}
        typer.echo(errors.render(every, texts), err=True)


def make_console() -> Any:
    """Where runs print; ranks but the first print nothing."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, quiet=not FIRST)
