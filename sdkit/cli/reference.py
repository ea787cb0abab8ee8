"""Commands about the language itself."""

from __future__ import annotations

import typer

from sdkit.cli.app import app


@app.command(epilog="Example: `sdkit schema > sdkit.schema.json`; docs/editors.md shows how editors read it.")
def schema() -> None:
    """Print the JSON Schema of run files and method pages, with which editors complete and check specs."""
    import json

    from sdkit.language.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
