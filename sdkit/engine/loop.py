"""The run: rollouts, updates, the teacher, evaluation, in this order, until the last step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from sdkit.batches import RolloutBatch
from sdkit.engine import checkpoint, ranks
from sdkit.engine.evaluate import evaluate, held_out_loss, teacher_lift
from sdkit.engine.gather import completion_text, gather
from sdkit.engine.keeping import kept
from sdkit.engine.measuring import ready
from sdkit.engine.metrics import step_metrics
from sdkit.engine.step import Measured, train_step
from sdkit.problems import NumericsGuard, Stopped

if TYPE_CHECKING:
    from sdkit.engine.report import Report
    from sdkit.engine.world import World

SKIPS_ALLOWED = 3


def run(world: World, report: Report) -> None:
    """Train from the world's step to the last; evaluates at both ends and in between.

    Raises Stopped after a checkpoint where SIGINT or SIGTERM asked for it, and NumericsGuard where several optimizer
    steps in a row had no finite gradient.
    """
    if world.step == 0:
        before = _evaluate(world, report)
        if before is not None:
            report.lift(teacher_lift(world, before))
    elif _evaluation_due(world) and world.step not in report.evaluated_at:
        _evaluate(world, report)  # the run was stopped between a step and its evaluation
    with _stop_requests() as stop:
        for step in range(world.step, world.end):
            _one_step(world, report, step)
            if ranks.most(stop["asked"]) and world.step < world.end:
                saved = checkpoint.save(world, report.run.path)
                raise Stopped(
                    f"stopped after step {world.step}, saved {saved}", hint="continue with --resume"
                )
            if _evaluation_due(world):
                _evaluate(world, report)
            every = world.spec.output.checkpoint_every
            if every and world.step % every == 0 and world.step < world.end:
                checkpoint.save(world, report.run.path)


def _one_step(world: World, report: Report, step: int) -> None:
    started = time.perf_counter()
    gathered = gather(world, world.data.take(step), ("rollout", step))
    sampled = time.perf_counter()
    keep, shares = kept(world.spec.rollout.keep, gathered.batch, partial(completion_text, world))
    batch = ready(world, keep)
    counted = time.perf_counter()
    parts = batch.split(world.plan.updates_per_step)
    measured = [_update(world, part) for part in parts if ranks.most(len(part))]
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


def _update(world: World, part: RolloutBatch) -> Measured:
    measured = train_step(world, part)
    world.skipped = 0 if measured.applied else world.skipped + 1
    if world.skipped >= SKIPS_ALLOWED:
        raise NumericsGuard(
            f"{SKIPS_ALLOWED} optimizer steps in a row had a gradient that is not finite; the last one after step "
            f"{world.step}",
            hint="lower optimizer.lr, or set model.dtype: float32",
        )
    return measured


def _evaluation_due(world: World) -> bool:
    evaluation = world.spec.evaluation
    if evaluation is None:
        return False
    last = world.step == world.end
    return last or bool(evaluation.every and world.step % evaluation.every == 0)


def _evaluate(world: World, report: Report) -> Any:
    if world.spec.evaluation is None:
        return None
    started = time.perf_counter()
    found = evaluate(world)
    losses = held_out_loss(world)
    report.evaluated(world, found, losses, time.perf_counter() - started)
    return found


@contextlib.contextmanager
def _stop_requests() -> Iterator[dict[str, bool]]:
    """Note SIGINT and SIGTERM instead of dying from them; a second SIGINT interrupts at once."""
    stop = {"asked": False}

    def ask(number: int, _frame: Any) -> None:
        if stop["asked"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop["asked"] = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
