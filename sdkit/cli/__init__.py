"""The command line: arguments, exit codes, printing.  Commands do their heavy imports when they run."""

from __future__ import annotations

import os
import re
import sys
import warnings

if not os.environ.get("SDKIT_DEBUG"):
    # Libraries' deprecation warnings about each other do not concern a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")

import typer

from sdkit.cli import doctor, runs, saved, sets, specs, syntax, writing  # each module adds its commands to `app`
from sdkit.cli.app import app
from sdkit.devices import hide_gpus_if_requested, set_thread_waits
from sdkit.language.errors import INTERRUPTED, SdkitError, UnreadableInput
from sdkit.stdout import is_first_rank

__all__ = ["app", "doctor", "main", "runs", "saved", "sets", "specs", "syntax", "writing"]


_DASHED_OVERRIDE = re.compile(r"--?(\w+(?:\.\w+)+)(?:=.*)?", re.DOTALL)
"""No option of sdkit has a dot in its name."""


def _refuse_dashed_overrides(words: list[str]) -> None:
    for word in words:
        if match := _DASHED_OVERRIDE.fullmatch(word):
            key, value = match[1], word.partition("=")[2] or "VALUE"
            raise UnreadableInput(f"{word} is no option: overrides have no dashes", hint=f"write {key}={value}")


def main() -> None:
    """Run the command line; an expected failure, or a stop on request, prints one message and exits with its code."""
    try:
        _refuse_dashed_overrides(sys.argv[1:])
        set_thread_waits()
        hide_gpus_if_requested()
        app()
    except SdkitError as error:
        place = f"{error.place}: " if error.place else ""
        rank = "" if is_first_rank() else f"rank {os.environ['RANK']}: "
        kind = "error: " if error.is_failure else ""
        typer.echo(f"{rank}{kind}{place}{error}", err=True)
        if error.hint:
            typer.echo(f"  = {error.hint}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
