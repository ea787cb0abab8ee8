"""The run: rollouts, updates, the teacher, evaluation, in this order, until the last step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from sdkit.batches import RolloutBatch
from sdkit.checkpoints import checkpoint, rng
from sdkit.checkpoints.best import keep_best
from sdkit.distributed import collectives
from sdkit.language.errors import NumericsGuard, Stopped
from sdkit.runs.evaluations import EvaluationResult
from sdkit.train import stop_requests
from sdkit.train.collect_rollouts import CollectedRollouts, collect_rollouts, completion_text
from sdkit.train.evaluate import evaluate, headline, held_out_loss, teacher_lift
from sdkit.train.metrics import step_metrics
from sdkit.train.rollout_filters import filter_rollouts
from sdkit.train.step import LossNotFinite, StepResult, train_step
from sdkit.train.stop_requests import EvaluationAbandoned, StopRequests
from sdkit.train.token_statistics import prepare_rollouts

if TYPE_CHECKING:
    from sdkit.train.report import Report
    from sdkit.train.state import TrainState

SKIPS_ALLOWED = 3


def run(state: TrainState, report: Report) -> None:
    """Train from the state's step to the last; evaluates at both ends and in between.

    Raises Stopped after a checkpoint where SIGINT or SIGTERM asked for it, and NumericsGuard before a step whose loss is
    not finite, and where several in a row had no finite gradient.
    """
    with stop_requests.stop_requests() as stop:
        _evaluate_start(state, report, stop)
        for step in range(state.step, state.end):
            _train_on_batch(state, report, step)
            _stop_if_requested(state, report, stop)
            if _evaluation_due(state):
                _evaluate(state, report, stop)
            every = state.spec.output.checkpoint_every
            if every and state.step % every == 0 and state.step < state.end:
                checkpoint.save(state, report.run.path)


def _evaluate_start(state: TrainState, report: Report, stop: StopRequests) -> None:
    """The evaluation that is due before the next step: at the start, or where the run was stopped before it."""
    if state.step and not _evaluation_due(state):
        return
    known = state.step in report.evaluated_at
    before = report.first if known else _evaluate(state, report, stop)
    if state.step or before is None or report.lifted:
        return
    with _abandonable(state, report, stop):
        lift = teacher_lift(state, before)
    report.lift(lift)


def _stop_if_requested(
    state: TrainState, report: Report, stop: StopRequests, *, left: bool = False
) -> None:
    """End the run where it was asked to stop and something is left to do: `left`, or more steps."""
    if collectives.all_reduce_max(stop.asked) and (left or state.step < state.end):
        saved = checkpoint.save(state, report.run.path)
        raise Stopped(
            f"stopped after step {state.step}, saved {saved}", hint="continue with --resume"
        )


@contextlib.contextmanager
def _abandonable(state: TrainState, report: Report, stop: StopRequests) -> Iterator[None]:
    """A measurement: where it is left at once, or asked to stop, the next attempt makes it anew or goes on behind it."""
    before = rng.state()
    try:
        with stop.abandonable():
            yield
    except EvaluationAbandoned:
        rng.restore(before)
        _stop_if_requested(state, report, stop, left=True)


def _train_on_batch(state: TrainState, report: Report, step: int) -> None:
    started = time.perf_counter()
    gathered = collect_rollouts(state, state.data.batch_rows(step), ("rollout", step))
    sampled = time.perf_counter()
    keep, shares = filter_rollouts(
        state.spec.rollout.keep, gathered.batch, partial(completion_text, state)
    )
    batch = prepare_rollouts(state, keep)
    counted = time.perf_counter()
    parts = batch.split(state.plan.updates_per_step)
    measured = [
        _update(state, report, gathered, part)
        for part in parts
        if collectives.all_reduce_max(len(part))
    ]
    moved = (
        measured
        and state.teacher
        and state.teacher.after_rollout_batch(state.masters, state.scalar)
    )
    state.step = step + 1
    seconds = time.perf_counter() - started
    metrics = step_metrics(state, gathered, measured, shares, len(batch), seconds)
    metrics["time/measure"] = counted - sampled
    if moved and state.teacher:
        metrics["teacher_distance"] = state.teacher.distance
    report.step(state, gathered, metrics)


def _update(
    state: TrainState, report: Report, gathered: CollectedRollouts, part: RolloutBatch
) -> StepResult:
    try:
        measured = train_step(state, part)
    except LossNotFinite:
        raise _numerics_failure(state, report, gathered, part, "the loss is not finite") from None
    state.skipped = 0 if measured.applied else state.skipped + 1
    if state.skipped >= SKIPS_ALLOWED:
        what = f"{SKIPS_ALLOWED} optimizer steps in a row had a gradient that is not finite"
        raise _numerics_failure(state, report, gathered, part, what)
    return measured


def _numerics_failure(
    state: TrainState, report: Report, gathered: CollectedRollouts, part: RolloutBatch, what: str
) -> NumericsGuard:
    kept = report.bad_batch(state, gathered, part)
    since = checkpoint.newest_step(report.run.path)
    return NumericsGuard(
        f"{what}, in step {state.step + 1}, on the rollouts in {kept}",
        hint=f"`sdkit replay {report.run.path}@{since}` trains on them again; lower optimizer.lr, or set model.dtype: "
        "float32",
    )


def _evaluation_due(state: TrainState) -> bool:
    evaluation = state.spec.evaluation
    if evaluation is None:
        return False
    last = state.step == state.end
    return last or bool(evaluation.every and state.step % evaluation.every == 0)


def _evaluate(state: TrainState, report: Report, stop: StopRequests) -> EvaluationResult | None:
    if state.spec.evaluation is None:
        return None
    started = time.perf_counter()
    with _abandonable(state, report, stop):
        found = evaluate(state)
        losses = held_out_loss(state)
    keep_best(state, report.run, found.metrics(headline(state)) | losses)
    report.evaluated(state, found, losses, time.perf_counter() - started)
    _stop_if_requested(state, report, stop)
    return found
