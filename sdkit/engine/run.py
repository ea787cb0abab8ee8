"""`train` and `eval` from a checked spec to a finished run directory."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sdkit.components.vllm_scores import ServedModel
from sdkit.components.vllm_server import ServerPool
from sdkit.components.vllm_weights import WeightFolder
from sdkit.components.vllm_wire import Wanted
from sdkit.engine import (
    checkpoint,
    ending,
    loop,
    ranks,
    report,
    resuming,
    rundir,
    shown,
    stopping,
    streams,
    zero,
)
from sdkit.engine.evaluate import evaluate, headline
from sdkit.engine.known_ids import known_ids
from sdkit.engine.launch import launched
from sdkit.engine.manifest import Origin, spec_digest
from sdkit.engine.models import (
    check_vocabulary,
    load_config,
    load_tokenizer,
    locate,
    weights_folder,
)
from sdkit.engine.plot import plot
from sdkit.engine.prepare import Data
from sdkit.engine.provenance import provenance
from sdkit.engine.replay import Recording, same_recording
from sdkit.engine.world import World
from sdkit.machine import machine_for
from sdkit.plan import make_plan
from sdkit.problems import BadEnvironment, SdkitError, Stopped, blaming
from sdkit.specs import (
    ExperimentSpec,
    ExternalWeights,
    ServedWeights,
    VllmServerBackend,
    other_models,
    served_teachers,
    tokens_told,
)


def open_world(
    spec: ExperimentSpec,
    base: Path,
    recording: Recording | None = None,
    now: datetime | None = None,
) -> World:
    """Data first (bad rows are found before a weight is loaded), then DeepSpeed, model, teacher.

    With a recording its completions are the run's, and the run ends where they do.  `now` is the date that chat
    templates print.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    zero.prepare()
    with blaming("model", "path"):
        located = locate(spec.model.path, base)
        tokenizer = load_tokenizer(spec.model, located)
    for path, weights in other_models(spec):
        with blaming(*path, "path"):
            theirs = load_tokenizer(weights, locate(weights.path, base))
            check_vocabulary(tokenizer, theirs, weights.path)
    served = _reach(spec, base, tokenizer)
    with contextlib.ExitStack() as undo:
        servers = _reach_servers(spec, base, located)
        if servers:
            undo.callback(servers.close)
        now = now or shown.recorded_date(spec, base, recording)
        known = known_ids(spec, base, located)
        data = Data(spec, base, tokenizer, now=now, known=known)
        world = _open(spec, base, data, located, served, servers, recording)
        undo.pop_all()
    return world


def _open(
    spec: ExperimentSpec,
    base: Path,
    data: Data,
    located: str,
    served: Mapping[ServedWeights, ServedModel],
    servers: ServerPool | None,
    recording: Recording | None,
) -> World:
    if recording:
        recording.check_rows(data)
    zero.start()
    try:
        data.prompter.now = ranks.of_first(data.prompter.now)  # ranks start at different times
        plan = make_plan(spec, machine_for(spec, ranks.world_size()), None, rows=len(data.train))
        assert plan.steps is not None
        longest = data.check(plan.steps)
        if recording:
            shown.same_prompts(
                data, recording.origin, f"{recording.run} was recorded with", "train"
            )
        for model in served.values():
            model.check_length(longest)
        if servers:
            servers.check_length(longest)
        if recording:
            plan = recording.planned(plan)
        world = World(spec, plan, base, data, located, longest, served, servers)
        if recording:
            world.end = recording.end
        return world
    except BaseException:
        zero.stop(together=False)
        raise


def _reach(spec: ExperimentSpec, base: Path, tokenizer: Any) -> dict[ServedWeights, ServedModel]:
    """Every served teacher, found fit to teach: before anything heavy is loaded."""
    found: dict[ServedWeights, ServedModel] = {}
    for _, weights in served_teachers(spec):
        if weights in found:
            continue
        if weights.tokenizer:
            theirs = ExternalWeights(path=weights.tokenizer)
            told = load_tokenizer(theirs, locate(weights.tokenizer, base))
            check_vocabulary(tokenizer, told, weights.tokenizer)
        found[weights] = ServedModel(weights, tokens_told(spec) or 0, os.environ)
        found[weights].check(tokenizer)
    return found


def _reach_servers(spec: ExperimentSpec, base: Path, located: str) -> ServerPool | None:
    """The rollout servers, found fit to sample; of the first rank alone, which talks to them."""
    backend = spec.rollout.backend
    if not isinstance(backend, VllmServerBackend) or not _first():
        return None

    def say(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    with blaming("rollout", "backend"):
        wanted = Wanted(
            config=load_config(spec.model, located),
            dtype=backend.dtype or spec.model.dtype,
            folder=WeightFolder(weights_folder(backend, base)),
        )
        try:
            pool = ServerPool(backend, wanted, os.environ, say)
            pool.check()
        except SdkitError:
            wanted.folder.close()
            raise
        return pool


def train(
    spec: ExperimentSpec,
    base: Path,
    folder: Path,
    console: Console,
    *,
    written: str,
    resolved: str,
    resume: bool = False,
    overwrite: bool = False,
    recording: Recording | None = None,
) -> Path:
    """Run a spec; returns the run directory.  `written` and `resolved` are the spec's text before and after.

    With a recording its rollouts are trained on again, from the state before the first of them.
    """
    if recording:
        recording.check_spec(spec, folder)
    rundir.claim(folder, resume=resume, overwrite=overwrite)
    last = _last(spec, folder, resolved, console, recording) if resume else None
    if recording and recording.checkpoint:
        word = recording.origin.get("run")
        resuming.fit(recording.checkpoint, word, launched() or 1, hashes=_first())
    began = shown.date_of(rundir.provenance(folder)) if resume else None
    world = open_world(spec, base, recording, began)
    last = ranks.of_first(last)
    run = _directory(folder, resume=last is not None, tensorboard=spec.output.tensorboard)
    try:
        if last:
            _take_up(world, run, last)
        else:
            streams.begin(spec.training.seed, ranks.rank())
            run.write_text("spec.yaml", written)
            run.write_text(rundir.MARK, resolved)
            run.write_json(rundir.ORIGIN, _provenance(world, base, recording))
            if recording and recording.checkpoint:
                checkpoint.load(world, recording.checkpoint)
                recording.write_history(run)
        checkpoint.check_saving(world)
        report.opening(console, world, run)
        run.status("running", step=world.step)
        _train(world, run, console)
        run.status("done", step=world.step)
    except BaseException as error:
        raise _ended(error, world, run) from error
    _leave(world, run, together=True)
    return folder


def _ended(error: BaseException, world: World, run: rundir.RunDirectory) -> BaseException:
    """Leave a run before its end and write down how it ended; what the command is to report."""
    roll = ranks.RollCall() if ending.is_lost(error) else None
    reported = ending.explained(error, run)
    stopped = isinstance(reported, Stopped)
    _status(run, "stopped" if stopped else "failed", world.step, reported)
    _leave(world, run, together=stopped)
    if roll:
        reported = ending.lost(roll.missing(), error)
        _status(run, "failed", world.step, reported)
    return reported


def _status(run: rundir.RunDirectory, state: str, step: int, error: BaseException) -> None:
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    with contextlib.suppress(BadEnvironment):  # a full disk is what `error` says
        run.status(state, step=step, reason=reason or type(error).__name__)


def _last(
    spec: ExperimentSpec,
    folder: Path,
    resolved: str,
    console: Console,
    recording: Recording | None,
) -> Path | None:
    """The checkpoint that the run is taken up from; None: it had none yet.  What was found on the way is said.

    The first rank alone reads every byte; what it chose is then everyone's.
    """

    def say(text: str) -> None:
        console.print(f"[yellow]warning[/]: {escape(text)}", highlight=False)

    same_recording(folder, recording)
    resuming.last_attempt(folder, say)
    resuming.same_spec(folder, resolved)
    own = Origin(
        run=rundir.provenance(folder).get("run"), spec=spec_digest(spec), ranks=launched() or 1
    )
    return resuming.newest(folder, own, say, hashes=_first())


def _first() -> bool:
    """Whether this is the first rank, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def _take_up(world: World, run: rundir.RunDirectory, last: Path) -> None:
    resuming.same_data(run.path, world.data.fingerprints())
    shown.same_prompts(world.data, rundir.provenance(run.path), "this run began with")
    checkpoint.load(world, last)
    run.forget_after(world.step)


def _directory(folder: Path, *, resume: bool, tensorboard: bool) -> rundir.RunDirectory:
    """The run directory, which the first rank alone writes to."""
    if ranks.rank():
        return rundir.ReadOnly(folder, tensorboard=False)
    if resume:
        return rundir.RunDirectory(folder, tensorboard)
    return rundir.create(folder, tensorboard=tensorboard)


def _leave(world: World, run: rundir.RunDirectory, *, together: bool) -> None:
    run.close()
    world.close(together=together)
    zero.stop(together=together)


def _train(world: World, run: rundir.RunDirectory, console: Console) -> None:
    screen = report.Report(run, console, world.end)
    with screen.bar:
        loop.run(world, screen)
    with stopping.requests():  # all is done but writing it down: that comes to its end
        checkpoint.save_model(world, run.path)
        if ranks.rank() == 0:
            plot(run.history(), run.path / "plot.png", run.path.name)
    screen.finished(world)
    if screen.first and screen.last and screen.first is not screen.last:
        run.write_json("result.json", report.plain_comparison(screen.first, screen.last))
    console.print(f"run directory: {run.path}", highlight=False)


def evaluate_only(
    spec: ExperimentSpec, base: Path, console: Console, run: Path | None = None
) -> dict[str, float]:
    """The spec's evaluation on its start model, under the date of `run` where it is a run's; returns the metrics."""
    world = open_world(spec, base, now=run and shown.date_of(rundir.provenance(run)))
    together = False
    try:
        found = evaluate(world)
        metrics = found.metrics(headline(world))
        console.print(report.scores(found))
        together = True
        return metrics
    finally:
        world.close(together=together)
        zero.stop(together=together)


def _provenance(world: World, base: Path, recording: Recording | None) -> dict[str, Any]:
    model = {
        "path": world.spec.model.path,
        "revision": world.spec.model.revision,
        "located": world.located,
    }
    config = world.student.causal.config
    model["commit"] = getattr(config, "_commit_hash", None)
    others = [
        {"path": w.path, "revision": w.revision, "located": locate(w.path, base)}
        for _, w in other_models(world.spec)
    ]
    served = [
        {"url": w.url, "model": w.model, "root": model.root} for w, model in world.served.items()
    ]
    return provenance(
        base,
        run=secrets.token_hex(8),
        data=world.data.fingerprints(),
        prompts=shown.facts(world.data),
        model=model,
        other_models=others,
        served_teachers=served,
        seed=world.spec.training.seed,
        **({"replayed": recording.facts} if recording else {}),
    )
