"""The `sdkit` command, to which other modules add their subcommands."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sdkit import __version__

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this process is the first or only rank.  Other ranks print nothing but errors."""

app = typer.Typer(
    name="sdkit",
    help="Self-distillation and on-policy distillation of language models: a method is a page of YAML.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_CODES = """\b
Exit codes: 0 success, 1 problems found or the run failed, 2 usage or unreadable input, 3 bad data,
4 environment, 5 out of memory, 6 a process died or a deadline passed, 7 stopped and resumable, 8 numerics guard,
130 interrupted."""


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"sdkit {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    if local_rank is not None:  # some launchers add --local_rank to the command
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
