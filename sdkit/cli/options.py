"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdkit.cli import completion

SpecPath = Annotated[
    Path, typer.Argument(help="A run file or a method page.", show_default=False, autocompletion=completion.spec_files)
]
SpecOrRun = Annotated[
    Path,
    typer.Argument(
        help="A run file, a method page, or a run directory.", show_default=False, autocompletion=completion.spec_files
    ),
]
RunPath = Annotated[Path, typer.Argument(help="A run file.", show_default=False, autocompletion=completion.spec_files)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="`key.path=value` overrides, applied last.", show_default=False, autocompletion=completion.overrides
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        help="Ranks to start on this machine; leave it out under `torchrun` or `deepspeed`.",
        min=1,
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run directory.")]
ChangedCode = Annotated[
    bool,
    typer.Option("--changed-code", help="Accept that Python files of the run have changed: use them as they are now."),
]
ChangedModels = Annotated[
    bool, typer.Option("--changed-models", help="Accept that local models have changed: use them as they are now.")
]
Format = Annotated[
    Literal["text", "json", "github", "sarif"],
    typer.Option("--format", help="Output for people, for programs, for GitHub Actions, or for code scanning."),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N,…",
        help="Train once with each of these values of training.seed; the run directory then holds a run for each.",
        show_default=False,
    ),
]
Parallel = Annotated[
    int,
    typer.Option(
        "--parallel", help="With several runs: how many at the same time, each on devices of its own.", min=1
    ),
]


def check_options(resume: bool, overwrite: bool, accept: Sequence[str] = ()) -> None:
    """Raise BadParameter if options of a command that trains contradict each other."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if accept and not resume:
        raise typer.BadParameter(f"--changed-{accept[0]} needs --resume: a new run takes the files as they are")


def accepted(**options: bool) -> list[str]:
    """The names of the options that are set."""
    return [name for name, is_set in options.items() if is_set]
