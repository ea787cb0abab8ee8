"""`sdkit train`: from a checked spec to a finished run directory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sdkit.checkpoints import checkpoint, manifest, rng
from sdkit.checkpoints import resume as resuming
from sdkit.devices import keep_freed_memory
from sdkit.distributed import collectives, health, zero
from sdkit.distributed.launch import launched
from sdkit.language import specs
from sdkit.language.errors import INTERRUPTED, BadEnvironment, Diverged, SdkitError, Stopped, blaming
from sdkit.models.embedding_ids import known_ids
from sdkit.models.loading import check_vocabulary, load_tokenizer, resolve_model
from sdkit.plan.machine import machine_for
from sdkit.plan.plan import make_plan
from sdkit.runs import directory, fingerprints
from sdkit.runs.plot import plot
from sdkit.stdout import Phases, is_first_rank, print_warning
from sdkit.train import determinism, failures, loop, prompt_record, report, run_origin, stop_requests
from sdkit.train.carried import Carried
from sdkit.train.clients import Clients, connect_servers, connect_teachers, connect_writer
from sdkit.train.divergence import LOOK_AT
from sdkit.train.engine_memory import check_engine_fits
from sdkit.train.inputs import RunData
from sdkit.train.replay import Recording, check_same_recording
from sdkit.train.setup import RunSetup
from sdkit.train.shared_folder import check_shared
from sdkit.train.trainer import Trainer, open_trainer

ORDERLY_ENDS = {Stopped: "stopped", Diverged: "diverged"}
"""Errors that all ranks raise together, with the state that status.json then names."""
STATES: Mapping[type[BaseException], str] = {**ORDERLY_ENDS, KeyboardInterrupt: "interrupted"}
"""The states of runs that end early; of any other error: failed."""


def open_run(
    spec: specs.ExperimentSpec, base: Path, recording: Recording | None = None, now: datetime | None = None
) -> Trainer:
    """Load the data, then DeepSpeed, model and teacher, so that bad rows are reported before weights are loaded.

    With a recording, the run uses its completions and ends with them.  `now` is the date that chat templates print.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    determinism.prepare(spec.training.deterministic)
    if not torch.cuda.is_available():
        keep_freed_memory()
    zero.prepare()
    with blaming("model", "path"):
        located = resolve_model(spec.model.path, base)
        tokenizer = load_tokenizer(spec.model, located)
    for path, weights in spec.other_models():
        with blaming(*path, "path"):
            other = load_tokenizer(weights, resolve_model(weights.path, base))
            check_vocabulary(tokenizer, other, weights.path)
    served = connect_teachers(spec, base, tokenizer)
    writer = connect_writer(spec, recording)
    with contextlib.ExitStack() as cleanup:
        servers = connect_servers(spec, base, located)
        if servers:
            cleanup.callback(servers.close)
        now = now or prompt_record.recorded_date(spec, base, recording)
        known = known_ids(spec, base, located)
        data = RunData(spec, base, tokenizer, now=now, known=known)
        clients = Clients(served=served, servers=servers, writer=writer)
        trainer = _open_with_data(base, data, located, clients, recording)
        cleanup.pop_all()
    return trainer


def _open_with_data(base: Path, data: RunData, located: str, clients: Clients, recording: Recording | None) -> Trainer:
    if recording:
        recording.check_rows(data)
    zero.start(data.spec.training.deadline_seconds)
    try:
        with failures.explained():
            return _open_in_group(base, data, located, clients, recording)
    except BaseException:
        zero.stop(together=False)
        raise


def _open_in_group(base: Path, data: RunData, located: str, clients: Clients, recording: Recording | None) -> Trainer:
    """Open the trainer once the process group exists."""
    spec = data.spec
    # Ranks start at different times.
    data.set_date(collectives.broadcast_object(data.prompter.now))
    plan = make_plan(spec, machine_for(spec, collectives.world_size()), None, rows=len(data.train))
    steps = plan.steps
    assert steps is not None, "steps are known once the data are loaded"
    longest = data.check(steps)
    if recording:
        prompt_record.check_same_prompts(data, recording.origin, f"{recording.run} was recorded with", "train")
    for model in clients.served.values():
        model.check_length(longest)
    if clients.servers:
        clients.servers.check_length(longest)
    if recording:
        plan = recording.with_replay_backend(plan)
    setup = RunSetup(
        spec=spec,
        plan=plan,
        base=base,
        data=data,
        model_folder=located,
        longest_sequence=longest,
        end=recording.end if recording else steps,
    )
    return open_trainer(setup, clients)


def train(
    spec: specs.ExperimentSpec,
    base: Path,
    folder: Path,
    console: Console,
    *,
    written: str,
    resolved: str,
    resume: bool = False,
    overwrite: bool = False,
    recording: Recording | None = None,
    accept: Collection[fingerprints.Kind] = (),
    carried: Carried | None = None,
    phases: Phases | None = None,
) -> Path:
    """Train a spec; returns the run directory.  `written` and `resolved` are the spec's text before and after resolution.

    `carried`: the run is a stage of a sequence; what it starts with from the stage before, and saves for the next one.
    With a recording, train again on its rollouts, from the checkpoint before the first of them.  `accept`: what may have
    changed since the checkpoint or recording that the run starts from.  Raises Diverged after everything is written if
    the run has diverged.
    """
    if recording:
        recording.check_spec(spec, folder)
    directory.claim(folder, resume=resume, overwrite=overwrite)
    resume_from = _checkpoint_to_resume(spec, folder, resolved, console, recording) if resume else None
    _check_recorded_checkpoint(recording)
    if carried and not resume_from:
        carried.check()
    files = run_origin.check_files(spec, base, resume_from, recording, accept, console)
    phases = phases or Phases(console)
    started = time.perf_counter()
    date = prompt_record.template_date(directory.provenance(folder)) if resume else None
    attempts = run_origin.earlier_attempts(folder) if resume else []
    with phases.phase("loading data and models"):
        trainer = open_run(spec, base, recording, date)
    seconds = {"data and models": time.perf_counter() - started}
    resume_from = collectives.broadcast_object(resume_from)
    run = run_origin.open_directory(
        folder, spec.output, console, resume=resume_from is not None, replace=resume or overwrite
    )
    health.on_exit(lambda reason: directory.record_failure(folder, reason))
    try:
        check_shared(folder)
        files = run_origin.with_hub_models(files, spec, base)
        if resume_from:
            _restore(trainer, run, resume_from, files)
            step = trainer.progress.step
            console.print(f"resuming after step {step}, from {resume_from}", markup=False, highlight=False)
        else:
            _begin(trainer, run, recording, files, {"spec.yaml": written, directory.MARK: resolved}, attempts)
            if carried:
                carried.load(trainer.state)
        checkpoint.check_saving(trainer.models.student, trainer.setup.data.tokenizer)
        report.print_objective_card(console, trainer.setup, trainer.models, run, start=trainer.progress.step)
        run.status("running", step=trainer.progress.step, steps=trainer.setup.end)
        started = time.perf_counter()
        check_engine_fits(trainer.setup, trainer.learner.zero)
        with phases.phase("starting the rollout engine"):
            trainer.sampler.start_engines()
        report.print_start_up(console, seconds | {"rollout engine": time.perf_counter() - started})
        if cause := _train(trainer, run, console, phases, carried is not None):
            raise Diverged(f"the run diverged: {cause}", hint=f"{LOOK_AT}; {run.path / 'model'} has the last weights")
        run.status("done", step=trainer.progress.step, steps=trainer.setup.end)
    except BaseException as error:
        raise _report_failure(error, trainer, run) from error
    _close(trainer, run, together=True)
    return folder


def _report_failure(error: BaseException, trainer: Trainer, run: directory.RunDirectory) -> BaseException:
    """Close a run that ends early and record why in status.json; returns the error that the command reports."""
    roll_call = collectives.RollCall() if failures.is_rank_lost(error) else None
    reported = failures.reported_error(error, run)
    state = next((name for kind, name in STATES.items() if isinstance(reported, kind)), "failed")
    if not isinstance(reported, tuple(ORDERLY_ENDS)):
        code = reported.exit_code if isinstance(reported, SdkitError) else INTERRUPTED
        health.fail(code, str(reported), is_cause=roll_call is None)
    _write_failure_status(run, state, trainer, reported)
    _close(trainer, run, together=isinstance(reported, tuple(ORDERLY_ENDS)))
    if roll_call:
        missing = roll_call.missing_ranks()
        reported = failures.rank_lost(missing, error)
        _write_failure_status(run, "failed", trainer, reported)
        if 0 in missing:  # it wrote the status
            with contextlib.suppress(BadEnvironment):
                directory.record_failure(run.path, str(reported))
    return reported


def _write_failure_status(run: directory.RunDirectory, state: str, trainer: Trainer, error: BaseException) -> None:
    reason = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    with contextlib.suppress(BadEnvironment):  # if the disk is full, `error` says so
        run.status(state, step=trainer.progress.step, steps=trainer.setup.end, reason=reason)


def _checkpoint_to_resume(
    spec: specs.ExperimentSpec, folder: Path, resolved: str, console: Console, recording: Recording | None
) -> Path | None:
    """The checkpoint to resume from, after printing warnings; None if the run has none yet.

    Only the first rank verifies the hashes; its choice is then broadcast.
    """

    def warn(text: str) -> None:
        print_warning(console, text)

    check_same_recording(folder, recording)
    resuming.report_previous_attempt(folder, warn)
    resuming.check_same_spec(folder, resolved)
    expected = manifest.origin(folder, spec, launched() or 1)
    return resuming.newest_checkpoint(folder, expected, warn, hashes=is_first_rank())


def _check_recorded_checkpoint(recording: Recording | None) -> None:
    if recording and recording.checkpoint:
        run = recording.origin.get("run")
        resuming.check_usable(recording.checkpoint, run, launched() or 1, hashes=is_first_rank())


def _restore(trainer: Trainer, run: directory.RunDirectory, saved: Path, files: run_origin.RunFiles) -> None:
    """Continue from the checkpoint in `saved`."""
    data = trainer.setup.data
    resuming.check_same_data(run.path, data.fingerprints())
    prompt_record.check_same_prompts(data, directory.provenance(run.path), "this run began with")
    checkpoint.load(trainer.state, saved, data.spec.training.seed)
    run.forget_after(trainer.progress.step)
    if is_first_rank():
        run_origin.update(run, trainer.setup.base, trainer.progress.step, files)


def _begin(
    trainer: Trainer,
    run: directory.RunDirectory,
    recording: Recording | None,
    files: run_origin.RunFiles,
    texts: Mapping[str, str],
    attempts: Sequence[Mapping[str, Any]],
) -> None:
    """Begin a new run: seed the random streams, and write where the run comes from.

    `texts` are the spec's, by file name; `attempts` are earlier ones, which left no checkpoint.
    """
    seed = trainer.setup.spec.training.seed
    rng.seed_all(seed, collectives.rank())
    for name, text in texts.items():
        run.write_text(name, text)
    if is_first_rank():
        run_origin.write(run, trainer, recording, files, attempts)
    report.track_texts(run, texts, trainer.setup.plan)
    if recording and recording.checkpoint:
        checkpoint.load(trainer.state, recording.checkpoint, seed)
        recording.write_history(run)


def _close(trainer: Trainer, run: directory.RunDirectory, *, together: bool) -> None:
    run.close()
    trainer.close(together=together)
    zero.stop(together=together)


def _train(trainer: Trainer, run: directory.RunDirectory, console: Console, phases: Phases, keep: bool) -> str | None:
    """Train, save the model (with `keep` the state too) and print the results; returns how the run has diverged, if so."""
    reporter = report.Report(run, console, trainer.setup, phases)
    loop.run(trainer, reporter)
    saving = phases.phase("saving the model", log=False)
    # Training is done: let the model be written.
    with stop_requests.stop_requests(reporter.notify) as stop, stop.during("the model is saved"), saving:
        checkpoint.save_model(trainer.models.student, trainer.setup.data.tokenizer, run.path)
        if keep:
            checkpoint.save(trainer.state, run.path, trainer.setup.spec)
        if collectives.rank() == 0:
            plot(run.history(), run.path / "plot.png", run.path.name, reporter.panel)
    reporter.finished()
    console.print(f"run directory: {run.path}", highlight=False)
    return reporter.divergence()
