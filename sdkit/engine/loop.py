"""The run: rollouts, updates, the teacher, evaluation, in this order, until the last step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from sdkit.batches import RolloutBatch
from sdkit.engine import checkpoint, ranks, stopping, streams
from sdkit.engine.best import keep_best
from sdkit.engine.evaluate import evaluate, headline, held_out_loss, teacher_lift
from sdkit.engine.evaluated import Evaluated
from sdkit.engine.gather import Gathered, completion_text, gather
from sdkit.engine.keeping import kept
from sdkit.engine.measuring import ready
from sdkit.engine.metrics import step_metrics
from sdkit.engine.step import LossNotFinite, Measured, train_step
from sdkit.engine.stopping import LeftAtOnce, StopRequests
from sdkit.problems import NumericsGuard, Stopped

if TYPE_CHECKING:
    from sdkit.engine.report import Report
    from sdkit.engine.world import World

SKIPS_ALLOWED = 3


def run(world: World, report: Report) -> None:
    """Train from the world's step to the last; evaluates at both ends and in between.

    Raises Stopped after a checkpoint where SIGINT or SIGTERM asked for it, and NumericsGuard before a step whose loss is
    not finite, and where several in a row had no finite gradient.
    """
    with stopping.requests() as stop:
        _begin(world, report, stop)
        for step in range(world.step, world.end):
            _one_step(world, report, step)
            _heed(world, report, stop)
            if _evaluation_due(world):
                _evaluate(world, report, stop)
            every = world.spec.output.checkpoint_every
            if every and world.step % every == 0 and world.step < world.end:
                checkpoint.save(world, report.run.path)


def _begin(world: World, report: Report, stop: StopRequests) -> None:
    """The evaluation that is due before the next step: at the start, or where the run was stopped before it."""
    if world.step and not _evaluation_due(world):
        return
    known = world.step in report.evaluated_at
    before = report.first if known else _evaluate(world, report, stop)
    if world.step or before is None or report.lifted:
        return
    with _leaving(world, report, stop):
        lift = teacher_lift(world, before)
    report.lift(lift)


def _heed(world: World, report: Report, stop: StopRequests, *, left: bool = False) -> None:
    """End the run where it was asked to stop and something is left to do: `left`, or more steps."""
    if ranks.most(stop.asked) and (left or world.step < world.end):
        saved = checkpoint.save(world, report.run.path)
        raise Stopped(
            f"stopped after step {world.step}, saved {saved}", hint="continue with --resume"
        )


@contextlib.contextmanager
def _leaving(world: World, report: Report, stop: StopRequests) -> Iterator[None]:
    """A measurement: where it is left at once, or asked to stop, the next attempt makes it anew or goes on behind it."""
    before = streams.state()
    try:
        with stop.leaving():
            yield
    except LeftAtOnce:
        streams.restore(before)
        _heed(world, report, stop, left=True)


def _one_step(world: World, report: Report, step: int) -> None:
    started = time.perf_counter()
    gathered = gather(world, world.data.take(step), ("rollout", step))
    sampled = time.perf_counter()
    keep, shares = kept(world.spec.rollout.keep, gathered.batch, partial(completion_text, world))
    batch = ready(world, keep)
    counted = time.perf_counter()
    parts = batch.split(world.plan.updates_per_step)
    measured = [_update(world, report, gathered, part) for part in parts if ranks.most(len(part))]
    moved = (
        measured
        and world.teacher
        and world.teacher.after_rollout_batch(world.masters, world.scalar)
    )
    world.step = step + 1
    seconds = time.perf_counter() - started
    metrics = step_metrics(world, gathered, measured, shares, len(batch), seconds)
    metrics["time/measure"] = counted - sampled
    if moved and world.teacher:
        metrics["teacher_distance"] = world.teacher.distance
    report.step(world, gathered, metrics)


def _update(world: World, report: Report, gathered: Gathered, part: RolloutBatch) -> Measured:
    try:
        measured = train_step(world, part)
    except LossNotFinite:
        raise _unfit(world, report, gathered, part, "the loss is not finite") from None
    world.skipped = 0 if measured.applied else world.skipped + 1
    if world.skipped >= SKIPS_ALLOWED:
        what = f"{SKIPS_ALLOWED} optimizer steps in a row had a gradient that is not finite"
        raise _unfit(world, report, gathered, part, what)
    return measured


def _unfit(
    world: World, report: Report, gathered: Gathered, part: RolloutBatch, what: str
) -> NumericsGuard:
    kept = report.bad_batch(world, gathered, part)
    since = checkpoint.newest_step(report.run.path)
    return NumericsGuard(
        f"{what}, in step {world.step + 1}, on the rollouts in {kept}",
        hint=f"`sdkit replay {report.run.path}@{since}` trains on them again; lower optimizer.lr, or set model.dtype: "
        "float32",
    )


def _evaluation_due(world: World) -> bool:
    evaluation = world.spec.evaluation
    if evaluation is None:
        return False
    last = world.step == world.end
    return last or bool(evaluation.every and world.step % evaluation.every == 0)


def _evaluate(world: World, report: Report, stop: StopRequests) -> Evaluated | None:
    if world.spec.evaluation is None:
        return None
    started = time.perf_counter()
    with _leaving(world, report, stop):
        found = evaluate(world)
        losses = held_out_loss(world)
    keep_best(world, report.run, found.metrics(headline(world)) | losses)
    report.evaluated(world, found, losses, time.perf_counter() - started)
    _heed(world, report, stop)
    return found
