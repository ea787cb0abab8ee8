"""Commands about the language itself, and the method pages written in it."""

from __future__ import annotations

from typing import Annotated

import typer

from sdkit.cli import completion
from sdkit.cli.app import WRITING, app


@app.command(
    rich_help_panel=WRITING,
    epilog="Examples: `sdkit explain optimizer.lr`, `sdkit explain divergence`, `sdkit explain no_teacher`",
)
def explain(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY|CODE",
            help="A key or its path, a kind, or the code in brackets at the end of a message; "
            "without it, the keys of a run file.",
            show_default=False,
            autocompletion=completion.explained_names,
        ),
    ] = None,
) -> None:
    """Explain a key (meaning, type, range, default, choices, example) or a code (reason, a bad and a good example)."""
    import shutil

    from sdkit.language import explain as explanations

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    typer.echo(explanations.explain(name, width) if name else explanations.overview(width))


@app.command(
    rich_help_panel=WRITING,
    epilog="Examples: `sdkit methods`, `sdkit methods feedback`, `sdkit methods reverse teacher`",
)
def methods(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD]...",
            help="Only pages whose name, comment or needs have all of these words.",
            show_default=False,
            autocompletion=completion.method_names,
        ),
    ] = None,
) -> None:
    """List the packaged methods: name, paper, what a run file must add, and the idea."""
    import shutil
    import sys

    from sdkit.language.method_pages import find_pages, list_pages

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(list_pages(find_pages(words or ()), width))


@app.command(
    rich_help_panel=WRITING,
    epilog="Example: `sdkit schema > sdkit.schema.json`; docs/editors.md shows how editors read it.",
)
def schema() -> None:
    """Print the JSON Schema of run files and method pages, with which editors complete and check specs."""
    import json

    from sdkit.language.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
