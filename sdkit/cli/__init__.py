"""The command line: arguments, exit codes, printing.  Commands do their heavy imports when they run."""

from __future__ import annotations

import os
import sys
import warnings

# Must be set before torch is imported: two libraries' threads that spin at barriers slow each other to a crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not os.environ.get("SDKIT_DEBUG"):
    # Libraries' deprecation warnings about each other do not concern a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")

import typer

from sdkit.cli import runs, saved, specs, syntax  # each module adds its commands to `app`
from sdkit.cli.app import app
from sdkit.language.errors import INTERRUPTED, SdkitError
from sdkit.stdout import is_first_rank

__all__ = ["app", "main", "runs", "saved", "specs", "syntax"]


def main() -> None:
    """Run the command line; an expected failure, or a stop on request, prints one message and exits with its code."""
    try:
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
