"""The `sdkit` command, to which other modules add their subcommands."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sdkit import __version__
from sdkit.language.errors import EXIT_CODES

CHECKING, RUNNING, RESULTS, WRITING = "Check a spec", "Run it", "Use the results", "Write a spec"
"""The panels of `sdkit --help`."""

app = typer.Typer(
    name="sdkit",
    help="Self-distillation and on-policy distillation of language models: a method is a page of YAML.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"sdkit {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes. " + " ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()))
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    if local_rank is not None:  # some launchers add --local_rank to the command
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
