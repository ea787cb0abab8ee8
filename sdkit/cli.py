"""The door: arguments, exit codes, printing.  Heavy imports stand inside the commands."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

# Before torch is imported: threads of two libraries that spin at barriers slow each other to a crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not os.environ.get("SDKIT_DEBUG"):
    # What libraries think of each other's interfaces is no news to a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")

import typer

from sdkit import __version__
from sdkit.problems import INTERRUPTED, SdkitError

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this process is the first rank, or the only one: it alone speaks of what is well."""

app = typer.Typer(
    name="sdkit",
    help="Self-distillation and on-policy distillation of language models: a method is a page of YAML.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_CODES = """\b
Exit codes: 0 fine, 1 problems found or the run failed, 2 usage or unreadable input, 3 bad data,
4 environment, 5 out of memory, 6 a process died or a deadline passed, 7 stopped and resumable, 8 numerics guard,
130 interrupted."""

SpecPath = Annotated[Path, typer.Argument(help="A run file or a method page.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="`key.path=value` overrides, applied last.", show_default=False),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        help="Ranks to start on this machine; under `torchrun` or `deepspeed` leave it out.",
        min=1,
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run directory.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in the run directory.")
]
Format = Annotated[
    Literal["text", "json", "github"],
    typer.Option("--format", help="For people, for programs, or for GitHub Actions."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sdkit {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = None,
) -> None:
    if local_rank is not None:  # what some launchers add to the command
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command(epilog="Example: `sdkit validate specs/*.yaml`")
def validate(
    specs: Annotated[
        list[Path], typer.Argument(help="Run files or method pages.", show_default=False)
    ],
    format: Format = "text",
) -> None:
    """Check specs: every problem at once, with its place.  Loads nothing heavy."""
    from sdkit.language import load_spec

    found = {path: load_spec(path) for path in specs}
    _print_problems(list(found.values()), format)
    for path, checked in found.items():
        if checked.ok and format == "text":
            typer.echo(f"{path}: fine ({'run file' if checked.kind == 'run' else 'method page'})")
    if not all(checked.ok for checked in found.values()):
        raise typer.Exit(1)


@app.command(epilog="Example: `sdkit show specs/sdft.yaml optimizer.lr=1e-5`")
def show(spec: SpecPath, overrides: Overrides = None) -> None:
    """Print the resolved spec, each value with the place it comes from."""
    from sdkit.show import annotated

    typer.echo(annotated(_checked(spec, overrides)))


@app.command(
    epilog="Examples: `sdkit plan specs/sdft.yaml --data 2`, `sdkit plan specs/methods/sdpo.yaml`"
)
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    data: Annotated[
        int,
        typer.Option(
            "--data", help="Render this many rows: student and teacher prompt side by side.", min=0
        ),
    ] = 0,
) -> None:
    """Print what a run would do: roles, batches, memory, every derived value.  Loads no weights.

    Of a method page: its objective, teacher and sampler.
    """
    from sdkit.machine import machine_for, other_shapes, shape_of
    from sdkit.plan import make_plan, plan_method
    from sdkit.plan_text import render_method, render_plan

    checked = _checked(spec, overrides, run_file=data > 0)
    if checked.kind == "method":
        return typer.echo(render_method(plan_method(checked.spec)))
    run = checked.spec
    shapes = other_shapes(run, spec.parent)
    made = make_plan(run, machine_for(run), shape_of(run, spec.parent), other_shapes=shapes)
    typer.echo(render_plan(run, made))
    if data:
        from sdkit.engine.preview import preview

        with _placing(checked):
            preview(run, spec.parent, data, _console())
    return None


@app.command(
    epilog="Examples: `sdkit smoke specs/sdft.yaml`, `sdkit smoke specs/methods/sdft.yaml --steps 20`"
)
def smoke(
    spec: SpecPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2,
) -> None:
    """Two real optimizer steps on a tiny random model: the real code path, in seconds."""
    checked = _checked(spec, overrides)
    _smoke(checked, steps)


@app.command(
    epilog="Examples: `sdkit train specs/sdft.yaml`, `sdkit train specs/sdft.yaml training.steps=20 optimizer.lr=2e-5`"
)
def train(
    spec: SpecPath,
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Run directory (default: runs/NAME of the spec).", show_default=False
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, plan and smoke; train nothing.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Run a spec: evaluate, train, evaluate, and leave a run directory."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    checked = _checked(spec, overrides, run_file=True)
    if dry_run:
        plan(spec, overrides)
        return _smoke(checked, 2)
    _launch(checked.spec, processes)
    from sdkit.engine.run import train as run_spec
    from sdkit.show import annotated

    folder = to or Path(checked.spec.output.folder) / spec.stem
    with _placing(checked):
        run_spec(
            checked.spec,
            spec.resolve().parent,
            folder,
            _console(),
            written=spec.read_text(encoding="utf-8"),
            resolved=annotated(checked) + "\n",
            resume=resume,
            overwrite=overwrite,
        )
    return None


@app.command("eval", epilog="Examples: `sdkit eval specs/sdft.yaml`, `sdkit eval runs/sdft`")
def evaluate(
    spec: Annotated[
        Path, typer.Argument(help="A run file, or a run directory.", show_default=False)
    ],
    overrides: Overrides = None,
    processes: Processes = None,
) -> None:
    """Run a run file's evaluation on its start model, or on the model of a finished run."""
    path, extra, base = _evaluation_target(spec)
    checked = _checked(path, [*extra, *(overrides or [])], run_file=True, base=base)
    _launch(checked.spec, processes)
    from sdkit.engine.run import evaluate_only

    with _placing(checked):
        evaluate_only(checked.spec, base, _console())


def _evaluation_target(path: Path) -> tuple[Path, list[str], Path]:
    if not path.is_dir():
        return path, [], path.resolve().parent
    from sdkit.engine import rundir

    base = Path(rundir.origin(path)["base"])
    model = rundir.trained(path)
    return path / rundir.MARK, [f"model.path={model.resolve()}", "model.lora=null"], base


@app.command(
    epilog="Examples: `sdkit replay runs/sdft@0`, "
    "`sdkit replay runs/sdft@0 losses.distil.divergence=reverse_kl --to runs/reverse`"
)
def replay(
    recorded: Annotated[
        str,
        typer.Argument(
            metavar="RUN@STEP",
            help="A run directory, and the rollout batch to start at: 0 starts from the start model, another from the "
            "checkpoint of that step.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Run directory (default: RUN-replay beside RUN).", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Rollout batches (default: all that are recorded).", min=1, show_default=False
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    processes: Processes = None,
) -> None:
    """Train again on a run's recorded rollouts, with another loss, teacher, reward or optimizer on the same tokens.

    Without an override the run repeats itself.  `sdkit compare` takes both.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    from sdkit.engine import rundir
    from sdkit.engine.replay import open_recording
    from sdkit.show import annotated
    from sdkit.source import read

    recording = open_recording(recorded, steps)
    run, base = recording.run, Path(recording.origin["base"])
    checked = _checked(run / rundir.MARK, overrides, run_file=True, base=base)
    _launch(checked.spec, processes)
    from sdkit.engine.run import train as run_spec

    console = _console()
    console.print(f"replay: {recording}", markup=False, highlight=False)
    with _placing(checked):
        run_spec(
            checked.spec,
            base,
            to or run.with_name(f"{run.name}-replay"),
            console,
            written=read(run / "spec.yaml").text,
            resolved=annotated(checked) + "\n",
            resume=resume,
            overwrite=overwrite,
            recording=recording,
        )


@app.command(
    epilog="Examples: `sdkit export runs/sdft --to sdft`, `sdkit export runs/sdft --merge-lora --to sdft-merged`"
)
def export(
    run: Annotated[
        Path, typer.Argument(help="The directory of a finished run.", show_default=False)
    ],
    to: Annotated[
        Path,
        typer.Option("--to", help="The folder to write; it must not exist.", show_default=False),
    ],
    merge_lora: Annotated[
        bool,
        typer.Option(
            "--merge-lora", help="Of a run with adapters: the whole model, adapters merged into it."
        ),
    ] = False,
) -> None:
    """Write a Hugging Face folder with a model card: the trained model, or the adapter of a LoRA run."""
    from sdkit.engine.export import export as write
    from sdkit.engine.rundir import MARK, origin

    base = Path(origin(run)["base"])
    checked = _checked(run / MARK, None, run_file=True, base=base)
    typer.echo(write(checked.spec, base, run, to, merge=merge_lora))


CONVERT = "Example: `sdkit checkpoint convert runs/sdft --processes 1`"
checkpoint = typer.Typer(
    help="What `--resume` continues from.", no_args_is_help=True, epilog=CONVERT
)
app.add_typer(checkpoint, name="checkpoint")


@checkpoint.command(epilog=CONVERT)
def convert(
    run: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
    processes: Annotated[
        int,
        typer.Option("--processes", help="Ranks to fit.", min=1, show_default=False),
    ],
) -> None:
    """Rewrite a run's newest checkpoint for another number of ranks; `sdkit train SPEC --resume` then continues with these."""
    from sdkit.engine.converting import convert as rewrite
    from sdkit.engine.rundir import MARK, origin

    base = Path(origin(run)["base"])
    checked = _checked(run / MARK, None, run_file=True, base=base)

    def warn(text: str) -> None:
        typer.echo(f"warning: {text}", err=True)

    typer.echo(rewrite(checked.spec, run, processes, warn))


def _launch(spec: Any, processes: int | None) -> None:
    """Where more than one rank is asked for, run them in place of this process, which then ends."""
    from sdkit.engine.launch import launch, must_launch, this_command

    if must_launch(processes):
        from sdkit.plan import deal

        deal(spec, processes or 1)
        raise typer.Exit(launch(processes or 1, this_command()))


@app.command(
    epilog="Examples: `sdkit compare runs/sdft`, `sdkit compare runs/grpo runs/sdpo --x steps --to runs/both.png`"
)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, finished or not.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="The picture: .png, .pdf or .svg.")] = Path(
        "compare.png"
    ),
    x: Annotated[
        Literal["tokens", "steps", "time"],
        typer.Option("--x", help="The budget at which runs are held against each other."),
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
    """Print and plot runs against tokens, steps and time, with intervals; no winner inside the noise."""
    from sdkit.engine.compare_text import compare as compare_runs

    compare_runs(runs, _console(), to, x, score)


def _smoke(checked: Any, steps: int) -> None:
    from sdkit.engine.smoke import smoke as run_smoke

    with _placing(checked):
        lines = run_smoke(checked.spec, _console(), steps, Path(checked.loaded.folder))
    norms = ", ".join(f"{line['grad_norm']:.3g}" for line in lines if "grad_norm" in line)
    typer.echo(f"{checked.loaded.name}: smoke run fine, gradient norms {norms}")


def _checked(
    path: Path, overrides: list[str] | None, run_file: bool = False, base: Path | None = None
) -> Any:
    from sdkit.language import load_spec
    from sdkit.problems import UnreadableInput

    checked = load_spec(path, overrides or (), base=base)
    if not checked.ok or FIRST:
        _print_problems([checked], "text")
    if not checked.ok:
        raise typer.Exit(1)
    if run_file and checked.kind != "run":
        raise UnreadableInput(
            f"{path} is a method page",
            hint="a run file names it: `method: methods/NAME.yaml`, model, data, …",
        )
    return checked


@contextlib.contextmanager
def _placing(checked: Any) -> Iterator[None]:
    """What ends the command in here and blames a key of the spec says where that key is written."""
    try:
        yield
    except SdkitError as error:
        if error.path:
            written = checked.loaded.place(error.path)
            if error.place is None:
                error.place = written
            else:  # a line of the user's own code
                error.hint = "\n  = ".join(filter(None, [error.hint, f"asked for at {written}"]))
        raise


def _print_problems(found: Sequence[Any], format: str) -> None:
    from sdkit import problems

    # Run files that share a method page share its problems.
    every = list(dict.fromkeys(p for checked in found for p in checked.problems))
    if format == "json":
        typer.echo(problems.as_json(every))
    elif every and format == "github":
        typer.echo(problems.as_github(every))
    elif every:
        texts = {name: text for checked in found for name, text in checked.texts.items()}
        typer.echo(problems.render(every, texts), err=True)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, quiet=not FIRST)


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
