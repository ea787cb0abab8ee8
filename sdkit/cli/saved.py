"""Commands on run directories: list, compare, report, diff, cite, export, show rollouts, convert checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdkit.cli.app import RESULTS, app
from sdkit.cli.checking import check_run, check_spec, make_console
from sdkit.cli.options import SpecOrRun


@app.command(rich_help_panel=RESULTS, epilog="Examples: `sdkit runs`, `sdkit runs /scratch/me/runs --format json`")
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder to look in, at any depth; or one run directory.")] = Path(
        "runs"
    ),
    format: Annotated[
        Literal["text", "json"], typer.Option("--format", help="A table for people, or a list for programs.")
    ] = "text",
) -> None:
    """List the runs below a folder: state, steps, headline score, age, and the command that comes next."""
    from sdkit.runs.listing import list_runs, print_runs

    listed = list_runs(folder)
    if format == "json":
        typer.echo(json.dumps([run.as_json() for run in listed], indent=2))
    elif listed:
        print_runs(listed, make_console())
    else:
        typer.echo(f"no run directory below {folder}")


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit compare runs/sdft`, `sdkit compare runs/grpo runs/sdpo --x steps --to runs/both.png`",
)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, finished or not.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The plot to write: .png, .pdf or .svg.")] = Path("compare.png"),
    x: Annotated[
        Literal["tokens", "steps", "time"], typer.Option("--x", help="The budget at which runs are compared.")
    ] = "tokens",
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            help="Only this reward, or one SUITE/DECODING/REWARD: fewer comparisons, narrower intervals.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print and plot runs over tokens, steps and time, with intervals; no winner inside the noise.

    Of sequences: the accuracy matrix, transfer, forgetting, and their differences.
    """
    from sdkit.runs import sequence_text
    from sdkit.runs.compare_text import compare as compare_runs
    from sdkit.runs.sequences import holds_sequence

    if any(holds_sequence(run) for run in runs):
        return sequence_text.compare(runs, make_console())
    return compare_runs(runs, make_console(), to, x, score)


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit report runs/sdft`, `sdkit report runs/grpo runs/sdpo --to both.html`",
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, finished or not; folders of seeds, sweeps and sequences.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The page to write (.html).")] = Path("report.html"),
    x: Annotated[
        Literal["tokens", "steps", "time"], typer.Option("--x", help="The budget at which runs are compared.")
    ] = "tokens",
) -> None:
    """Write one page to read and to mail: scores, curves, held-out prompts, rollouts, settings, cost; it loads nothing."""
    from sdkit.report.page import write_report

    write_report(runs, to, x)
    typer.echo(f"report: {to}")


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit diff specs/grpo.yaml specs/sdpo.yaml`, `sdkit diff runs/sdft sdft`",
)
def diff(first: SpecOrRun, second: SpecOrRun) -> None:
    """Print what differs between two specs or runs: settings, derived numbers, code, data, environment."""
    from sdkit.runs.diff import print_differences

    print_differences(_side(first), _side(second), make_console())


def _side(path: Path) -> Any:
    """A spec as it is now, or a run as it was recorded."""
    from sdkit.api import plan_spec
    from sdkit.plan.numbers import derived_numbers
    from sdkit.plan.plan import MethodPlan
    from sdkit.runs.diff import Side, origins_of_run, origins_of_spec

    if path.is_dir():
        checked, base = check_run(path)
        origins = origins_of_run(path)
    else:
        checked = check_spec(path, (), warn=False)
        base = Path(checked.loaded.folder)
        origins = origins_of_spec(checked.spec, base)
    plan = plan_spec(checked.spec, base)
    numbers = {} if isinstance(plan, MethodPlan) else derived_numbers(checked.spec, plan)
    return Side(name=str(path), spec=checked.spec, numbers=numbers, origins=origins)


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit cite runs/sdft`, `sdkit cite runs/sdft --format latex`, "
    "`sdkit cite runs/sdft --format bibtex >> references.bib`",
)
def cite(
    run: Annotated[Path, typer.Argument(help="The directory of a run, or of several seeds.", show_default=False)],
    format: Annotated[
        Literal["markdown", "latex", "bibtex"],
        typer.Option(
            "--format", help="Paragraph, table and BibTeX; paragraph and table; or the BibTeX entries alone."
        ),
    ] = "markdown",
) -> None:
    """Print a run for a paper: a methods paragraph, a table of hyperparameters, and BibTeX of method and sdkit."""
    from sdkit.language.errors import UnreadableInput
    from sdkit.runs.cite import cite as text_of
    from sdkit.runs.cite import read, together
    from sdkit.runs.run_sets import is_set, read_set

    folders = [run]
    if is_set(run):
        runs_of = read_set(run)
        if runs_of.kind != "seeds":
            raise UnreadableInput(
                f"{run} holds runs of different specs", hint=f"name one: {runs_of.folder(runs_of.members[0])}"
            )
        folders = [runs_of.folder(member) for member in runs_of.members]
    checked = [(*check_run(folder), folder) for folder in folders]
    typer.echo(text_of(together([read(one.spec, base, folder) for one, base, folder in checked]), format))


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit export runs/sdft --to sdft`, `sdkit export runs/sdft --merge-lora --to sdft-merged`",
)
def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The folder to write; it must not exist.", show_default=False)],
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="For a LoRA run: write the full model with the adapter merged.")
    ] = False,
) -> None:
    """Write a Hugging Face folder with a model card: the trained model, or the adapter of a LoRA run."""
    from sdkit.runs.export import export as write

    checked, base = check_run(run)
    typer.echo(write(checked.spec, base, run, to, merge=merge_lora))


@app.command(
    rich_help_panel=RESULTS,
    epilog="Examples: `sdkit rollouts runs/sdft`, `sdkit rollouts runs/sdft@12 --row 3`, "
    "`sdkit rollouts runs/sdft@12 --to rollouts.html`",
)
def rollouts(
    recorded: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]",
            help="A run directory and a training step, as metrics.jsonl counts them: 1 is the first (default: the newest).",
            show_default=False,
        ),
    ],
    row: Annotated[
        int | None, typer.Option("--row", help="Only the rollouts of this row of the data.", min=0, show_default=False)
    ] = None,
    first: Annotated[int, typer.Option("--first", help="How many rollouts to show.", min=1)] = 8,
    prompts: Annotated[bool, typer.Option("--prompts", help="Show the prompts of student and teacher, too.")] = False,
    to: Annotated[
        Path | None, typer.Option("--to", help="Write this page (.html) instead of printing.", show_default=False)
    ] = None,
) -> None:
    """Show a step's rollouts as text: scores, and each token coloured by how far teacher and student are apart."""
    from sdkit.train.show_rollouts import select, show, write_page

    run, records = select(recorded, row, first)
    checked, base = check_run(run)
    if to:
        write_page(checked.spec, base, records, to, prompts=prompts)
        return typer.echo(f"wrote {to}")
    show(checked.spec, base, records, make_console(), prompts=prompts)
    return None


CONVERT = "Example: `sdkit checkpoint convert runs/sdft --processes 1`"
checkpoint = typer.Typer(help="Work with the checkpoints of a run.", no_args_is_help=True, epilog=CONVERT)
app.add_typer(checkpoint, name="checkpoint", rich_help_panel=RESULTS)


@checkpoint.command(epilog=CONVERT)
def convert(
    run: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
    processes: Annotated[
        int, typer.Option("--processes", help="Number of ranks of the new checkpoint.", min=1, show_default=False)
    ],
) -> None:
    """Rewrite a run's newest checkpoint for another number of ranks; continue with `sdkit train SPEC --resume`."""
    from sdkit.checkpoints.convert import convert as rewrite

    checked, _ = check_run(run)

    def warn(text: str) -> None:
        typer.echo(f"warning: {text}", err=True)

    typer.echo(rewrite(checked.spec, run, processes, warn))
