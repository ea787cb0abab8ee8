"""Commands that write run files and method pages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.cli import completion
from sdkit.cli.app import app
from sdkit.cli.checking import print_problems

DEFAULT_MODEL = "bundled:smollm2-135m-instruct"


@app.command(
    epilog="Examples: `sdkit new mine.yaml`, `sdkit new mine.yaml --method sdft --data train.jsonl --model Qwen/Qwen3-8B`"
)
def new(
    run_file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.", show_default=False)],
    method: Annotated[
        str | None,
        typer.Option(
            help="A packaged method; `sdkit methods` lists them.",
            show_default=False,
            autocompletion=completion.method_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl, .json or .parquet file, a saved data set, or a hub id.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A local folder or a hub id.", show_default=False)] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="sdkit's name of a column, and the data's.", show_default=False),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="exact, number, choice, math_verify, python_tests, or FILE.py:FUNCTION.", show_default=False
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="The teacher, if it is another model.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", help="Longest completion (default: the method's).", min=1, show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Length of the run (default: one epoch).", min=1, show_default=False)
    ] = None,
) -> None:
    """Write a commented run file for a method and your data; asks for what is missing.

    Columns and reward are read off the first rows.
    """
    from sdkit.data.new_run import Answers, write_run_file

    if run_file.exists():  # before anything is asked
        raise typer.BadParameter(f"{run_file} exists; name another file")
    ask = _ask if sys.stdin.isatty() else None
    answers = Answers(
        method=method or _required("--method", "which method? (`sdkit methods` lists them)", ask),
        data=data or _required("--data", "which data file?", ask),
        model=model or (typer.prompt("which model?", DEFAULT_MODEL, err=True) if ask else DEFAULT_MODEL),
        columns=_pairs(column or ()),
        reward=reward,
        teachers=teacher or (),
        max_new_tokens=max_new_tokens,
        steps=steps,
    )
    _write_checked(run_file, write_run_file(run_file, answers, ask))
    typer.echo(f"{run_file}: written; `sdkit plan {run_file}` shows what it would do")


def _ask(question: str, choices: Sequence[str]) -> str:
    import click

    return typer.prompt(question, type=click.Choice(list(choices)) if choices else str, err=True)


def _required(option: str, question: str, ask: Any) -> str:
    if ask is None:
        raise typer.BadParameter(f"{option} is missing: without a terminal nothing can be asked")
    return ask(question, ())


def _pairs(columns: Sequence[str]) -> dict[str, str]:
    """`NAME=COLUMN` by name."""
    pairs = {}
    for text in columns:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"--column is NAME=COLUMN, not {text}")
        pairs[name] = value
    return pairs


def _write_checked(target: Path, text: str) -> None:
    """Write a spec that has no errors; otherwise print them and leave no file.  Raises UnreadableInput if one is there."""
    from sdkit.language.errors import UnreadableInput
    from sdkit.language.load import load_spec

    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UnreadableInput(f"{target} exists", hint="name another file: this one is left as it is") from None
    except OSError as error:
        raise UnreadableInput(f"cannot write {target}: {error.strerror}") from None
    checked = load_spec(target)
    print_problems([checked], "text")
    if not checked.ok:
        target.unlink()
        typer.echo(f"error: {target} would have these errors, so it was not written", err=True)
        raise typer.Exit(1)
