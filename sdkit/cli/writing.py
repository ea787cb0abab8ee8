"""Commands that write run files and method pages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkit.cli import completion
from sdkit.cli.app import WRITING, app
from sdkit.cli.checking import print_problems, print_source_problems
from sdkit.cli.specs import check_with_first_rows

DEFAULT_MODEL = "bundled:smollm2-135m-instruct"


@app.command(
    rich_help_panel=WRITING,
    epilog="Examples: `sdkit new mine.yaml`, `sdkit new mine.yaml --method sdft --data train.jsonl --model Qwen/Qwen3-8B`",
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
        typer.Option(
            help="A .jsonl, .json, .csv or .parquet file, a saved data set, or a hub id.", show_default=False
        ),
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
    writer: Annotated[
        str | None, typer.Option(help="The model that writes about rollouts, if one does.", show_default=False)
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
        writer=writer,
        max_new_tokens=max_new_tokens,
        steps=steps,
    )
    _write_checked(run_file, write_run_file(run_file, answers, ask))
    typer.echo(f"{run_file}: written; `sdkit plan {run_file}` shows what it would do")


@app.command(
    rich_help_panel=WRITING,
    epilog="Examples: `sdkit fmt specs/*.yaml`, `sdkit fmt --check specs/*.yaml methods/*.yaml`",
)
def fmt(
    specs: Annotated[
        list[Path],
        typer.Argument(help="Run files or method pages.", show_default=False, autocompletion=completion.spec_files),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with code 1 if a file would change.")
    ] = False,
) -> None:
    """Put keys in the language's order and spell them its way; comments and layout stay, and the spec is the same."""
    from sdkit.language.formatting import format_spec
    from sdkit.runs.directory import write_atomically

    changed = unreadable = 0
    for path in specs:
        source, text = format_spec(path)
        if source.problems:
            unreadable += 1
            print_source_problems(source)
        elif text != source.text:
            changed += 1
            if not check:
                file = path.resolve()
                mode = file.stat().st_mode
                write_atomically(file, text)
                file.chmod(mode)
            typer.echo(f"{path}: {'would change' if check else 'formatted'}")
    if unreadable or (check and changed):
        raise typer.Exit(1)


@app.command(
    "import",
    rich_help_panel=WRITING,
    epilog="Examples: `sdkit import trl_config.yaml --to mine.yaml`, "
    "`sdkit import sdpo.yaml --to mine.yaml --from verl actor_rollout_ref.actor.optim.lr=1e-5`",
)
def import_(
    config: Annotated[Path, typer.Argument(help="The configuration, as YAML or JSON.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The run file to write; it must not exist.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="`key=value` of the configuration's own keys, applied last.", show_default=False),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Whose configuration it is: trl_sdft, trl_sdpo, trl_gkd, trl_grpo or verl (default: read off its keys).",
            show_default=False,
            autocompletion=completion.peer_names,
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", help="Processes that the configuration is for: TRL's batch depends on them.", min=1
        ),
    ] = 1,
) -> None:
    """Translate a configuration of TRL, verl or the SDPO repository into a run file, and list what has no equivalent."""
    from sdkit.language.formatting import format_spec
    from sdkit.language.load import load_spec
    from sdkit.language.peers import translate

    table, translation = translate(config, overrides or (), peer, processes)
    head = f"# From {config.name}, {table.summary}.  Comments name the setting that a value comes from.\n"
    _write_new(to, head + translation.text)
    _, text = format_spec(to)
    to.write_text(text, encoding="utf-8")
    checked = load_spec(to)
    print_problems([checked], "text")
    typer.echo("\n".join(filter(None, [f"{to}: written, from {table.summary}", translation.report()])))
    if not checked.ok:
        raise typer.Exit(1)


def _ask(question: str, choices: Sequence[str]) -> str:
    shown = f"{question} ({', '.join(choices)})" if choices else question
    while (answer := typer.prompt(shown, err=True)) not in (choices or [answer]):
        typer.echo(f"{answer} is not one of them", err=True)
    return answer


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
    _write_new(target, text)
    checked, _ = check_with_first_rows(str(target), [])
    print_problems([checked], "text")
    if not checked.ok:
        target.unlink()
        typer.echo(f"error: {target} would have these errors, so it was not written", err=True)
        raise typer.Exit(1)


def _write_new(target: Path, text: str) -> None:
    """Write a file that does not exist yet.  Raises UnreadableInput if it does, or cannot be written."""
    from sdkit.language.errors import UnreadableInput

    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UnreadableInput(f"{target} exists", hint="name another file: this one is left as it is") from None
    except FileNotFoundError:
        raise UnreadableInput(f"there is no folder {target.parent} to write {target.name} to") from None
    except OSError as error:
        raise UnreadableInput(f"cannot write {target}: {error.strerror}") from None
