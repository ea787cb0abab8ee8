"""Commands that train, serve, evaluate or replay."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdkit.cli import completion, sequences
from sdkit.cli.app import RUNNING, app
from sdkit.cli.checking import check_run, check_spec, make_console, placing
from sdkit.cli.options import (
    ChangedCode,
    ChangedModels,
    Overrides,
    Overwrite,
    Parallel,
    Processes,
    Resume,
    RunPath,
    Seeds,
    accepted,
    check_options,
)
from sdkit.cli.sets import check_run_file, evaluate_set, parsed_seeds, train_seeds
from sdkit.cli.specs import print_plan, rehearse
from sdkit.language.errors import ProcessDied, UnreadableInput
from sdkit.stdout import is_first_rank


@app.command(
    rich_help_panel=RUNNING,
    epilog="Examples: `sdkit train specs/sdft.yaml`, `sdkit train specs/sdft.yaml training.steps=20 optimizer.lr=2e-5`, "
    "`sdkit train specs/sdft.yaml --seeds 0,1,2`, `sdkit train specs/sequences/continual.yaml`",
)
def train(
    spec: RunPath,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Run directory (default: runs/NAME of the spec).", show_default=False)
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    changed_code: ChangedCode = False,
    changed_models: ChangedModels = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Plan, check all rows, call every reward on the rows' own answers, play the environment with scripted turns, "
            "and smoke-run; train nothing.",
        ),
    ] = False,
    processes: Processes = None,
    seeds: Seeds = None,
    parallel: Parallel = 1,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="Only this stage of a sequence file, after the one before.", show_default=False),
    ] = None,
) -> None:
    """Run a spec: evaluate, train, evaluate, and write a run directory.  Of a sequence file, run every stage.

    With `--seeds`, do so for each seed; `sdkit compare` reads the folder as one thing, as it does that of a sequence.
    """
    from sdkit.language.sequences import is_sequence
    from sdkit.runs.run_sets import is_set

    check_options(resume, overwrite, accept := accepted(code=changed_code, models=changed_models))
    if parallel > 1 and seeds is None:
        raise typer.BadParameter("--parallel needs --seeds: there is one run")
    numbers, carried = parsed_seeds(seeds), None
    settings = {"resume": resume, "overwrite": overwrite, "accept": accept}
    if not stage and is_sequence(spec):
        if dry_run:
            return sequences.rehearse_stages(spec, overrides)
        return sequences.train_stages(
            spec, overrides or [], numbers, to, processes=processes, parallel=parallel, **settings
        )
    if stage:
        checked, folder, carried = sequences.stage_to_train(spec, overrides, stage, to)
    else:
        checked = check_run_file(spec, overrides or [], numbers)
        folder = to or Path(checked.spec.output.folder) / spec.stem
    if dry_run:
        return _rehearse(checked, seeds)
    if numbers:
        return train_seeds(
            checked, spec, overrides or [], numbers, folder, processes=processes, parallel=parallel, **settings
        )
    if is_set(folder):
        raise UnreadableInput(
            f"{folder} holds several runs, not one", hint="add their --seeds, or name another with --to"
        )
    _launch_ranks(checked.spec, processes, folder)
    written, console = checked.texts[os.fspath(spec)], make_console(log=True)
    _train(checked, checked.base, folder, console, written, carried=carried, **settings)
    return None


def _rehearse(checked: Any, seeds: str | None) -> None:
    """Do everything that a run does before it loads its model, and a smoke run."""
    print_plan(checked, seeds)
    rehearse(checked, make_console())


@app.command(
    rich_help_panel=RUNNING,
    epilog="Examples: `sdkit serve specs/sdft.yaml rollout.backend=vllm_server`, `sdkit serve mine.yaml --port 8001`",
)
def serve(
    spec: RunPath,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            help="The port (default: that of the first of rollout.backend.urls).", min=1, max=65535, show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="Longest prompt and completion together, in tokens (default: read from the spec's data).",
            min=2,
            show_default=False,
        ),
    ] = None,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Accept requests from other machines, with the key that rollout.backend.key_from names.",
        ),
    ] = False,
) -> None:
    """Start a vLLM server that samples for a run of this spec; Ctrl-C ends it."""
    checked = check_spec(spec, overrides, run_file=True)
    from sdkit.serving import serve as serving
    from sdkit.train.inputs import longest_sequence

    with placing(checked):
        address = serving.address_of(checked.spec, host, port, allow_remote=allow_remote)

        def longest(model_folder: str) -> int:
            return max_tokens or longest_sequence(checked.spec, checked.base, model_folder)

        serving.serve(checked.spec, checked.base, address, make_console(log=True), longest)


@app.command(
    "eval",
    rich_help_panel=RUNNING,
    epilog="Examples: `sdkit eval specs/sdft.yaml`, `sdkit eval runs/sdft --to evaluations/sdft`, "
    "`sdkit eval runs/sdft --format json`",
)
def evaluate(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A run file, or a run directory.", show_default=False, autocompletion=completion.spec_files
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="A new folder for scores, intervals and every completion (default: none).", show_default=False
        ),
    ] = None,
    format: Annotated[
        Literal["text", "json"], typer.Option("--format", help="Scores for people, or for programs.")
    ] = "text",
    processes: Processes = None,
) -> None:
    """Run a run file's evaluation on its start model, or on the model of a finished run.

    On the folder of several seeds: on each model, with the means over prompts and seeds.
    """
    from sdkit.runs.run_sets import is_set

    if is_set(spec):
        return evaluate_set(spec, overrides or [], to, format, processes)
    checked, base = _check_evaluation(spec, overrides or [])
    _launch_ranks(checked.spec, processes)
    from sdkit.language.show import annotated
    from sdkit.stdout import Phases

    console = make_console(log=True, stderr=format == "json")
    phases = Phases(console)
    with phases.phase("loading libraries"):
        from sdkit.train import evaluate_model as evaluation

    with placing(checked):
        if to:
            evaluation.check_target(to)
        result = evaluation.evaluate_model(checked.spec, base, console, spec if spec.is_dir() else None, phases)
    facts = evaluation.report(checked.spec, result)
    if to:
        evaluation.write(to, annotated(checked) + "\n", facts, result)
        console.print(f"evaluation: {to}", markup=False, highlight=False)
    if format == "json" and is_first_rank():
        typer.echo(json.dumps(facts, indent=2))
    return None


def _check_evaluation(path: Path, overrides: list[str]) -> tuple[Any, Path]:
    """Check the run file, or the spec of the run with its trained model; return it and the folder its paths start from."""
    if not path.is_dir():
        checked = check_spec(path, overrides, run_file=True)
        return checked, checked.base
    from sdkit.runs.directory import trained_model

    trained = [f"model.path={trained_model(path).resolve()}", "model.lora=null"]
    return check_run(path, overrides, fixed=trained)


@app.command(
    rich_help_panel=RUNNING,
    epilog="Examples: `sdkit replay runs/sdft@0`, "
    "`sdkit replay runs/sdft@0 losses.distil.divergence=reverse_kl --to runs/reverse`",
)
def replay(
    recorded: Annotated[
        str,
        typer.Argument(
            metavar="RUN@STEP",
            help="A run directory and a step: 0 starts from the start model, any other from the checkpoint of that step.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Run directory (default: RUN-replay beside RUN).", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Rollout batches to train on (default: all that are recorded).", min=1, show_default=False),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    changed_code: ChangedCode = False,
    changed_models: ChangedModels = False,
    processes: Processes = None,
) -> None:
    """Train again on a run's recorded rollouts: the same tokens under another loss, teacher, reward or optimizer.

    Without overrides it repeats the run.  `sdkit compare` shows both.
    """
    check_options(resume, overwrite)
    from sdkit.language.source import read
    from sdkit.train.replay import open_recording

    recording = open_recording(recorded, steps)
    run = recording.run
    checked, base = check_run(run, overrides or ())
    folder, written = to or run.with_name(f"{run.name}-replay"), read(run / "spec.yaml").text
    _launch_ranks(checked.spec, processes, folder)
    console = make_console(log=True)
    console.print(f"replay: {recording}", markup=False, highlight=False, soft_wrap=True)
    accept = accepted(code=changed_code, models=changed_models)
    options = {"resume": resume, "overwrite": overwrite, "recording": recording, "accept": accept}
    _train(checked, base, folder, console, written, **options)


def _train(checked: Any, base: Path, folder: Path, console: Any, written: str, **options: Any) -> None:
    """Train a checked spec, whose text is `written` and whose paths start at `base`, in the run directory `folder`."""
    from sdkit.language.show import annotated
    from sdkit.stdout import Phases

    phases = Phases(console)
    with phases.phase("loading libraries"):
        from sdkit.train.run import train as run_spec

    with placing(checked):
        resolved = annotated(checked) + "\n"
        run_spec(checked.spec, base, folder, console, written=written, resolved=resolved, phases=phases, **options)


def _launch_ranks(spec: Any, processes: int | None, folder: Path | None = None) -> None:
    """Run the command on several ranks if requested, then exit with their code.

    If the ranks fail and leave the run directory `folder` in the state `running`, its state becomes `failed`.
    """
    from sdkit.distributed.launch import launch, must_launch, this_command

    if must_launch(processes):
        from sdkit.plan.plan import prompts_per_rank
        from sdkit.runs.directory import read_status, record_failure

        prompts_per_rank(spec, processes or 1)
        before = read_status(folder) if folder else {}
        died: ProcessDied | None = None
        try:
            code = launch(processes or 1, this_command())
        except ProcessDied as error:
            died, code = error, error.exit_code
        if code and folder and read_status(folder) != before:  # else these ranks did not get to their run
            record_failure(folder, str(died or f"a rank ended with code {code}"))
        raise died or typer.Exit(code)
