"""The door: arguments, exit codes, printing.  Heavy imports stand inside the commands."""

from __future__ import annotations

import os
import sys
import warnings

# Before torch is imported: threads of two libraries that spin at barriers slow each other to a crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not os.environ.get("SDKIT_DEBUG"):
    # What libraries think of each other's interfaces is no news to a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")

import typer

from sdkit.cli import runs, saved, specs  # each adds its commands
from sdkit.cli.app import FIRST, app
from sdkit.language.errors import INTERRUPTED, SdkitError

__all__ = ["app", "main", "runs", "saved", "specs"]


def main() -> None:
    """Run the command line; every expected failure is one message and its exit code."""
    try:
        app()
    except SdkitError as error:
        place = f"{error.place}: " if error.place else ""
        who = "" if FIRST else f"rank {os.environ['RANK']}: "
        typer.echo(f"{who}error: {place}{error}", err=True)
        if error.hint:
            typer.echo(f"  = {error.hint}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        sys.exit(INTERRUPTED)
