"""The training loop.  Each step collects rollouts, trains on them, updates the teacher and, when due, evaluates."""

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
"""A run ends after this many skipped optimizer steps in a row."""


def run(state: TrainState, report: Report) -> None:
    """Train from the current step to the last; evaluate at the start, at the end and in between.

    On SIGINT or SIGTERM, saves a checkpoint and raises Stopped.  Raises NumericsGuard before an optimizer step whose loss
    is not finite, and after SKIPS_ALLOWED steps in a row whose gradient is not finite.
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
    """Run the evaluation due before the next step: at the start of the run, or one that a stop request cut off."""
    if state.step and not _evaluation_due(state):
        return
    done = state.step in report.evaluated_at
    baseline = report.first if done else _evaluate(state, report, stop)
    if state.step or baseline is None or report.lifted:
        return
    with _abandonable(state, report, stop):
        lift = teacher_lift(state, baseline)
    report.lift(lift)


def _stop_if_requested(state: TrainState, report: Report, stop: StopRequests, *, unfinished: bool = False) -> None:
    """Save a checkpoint and raise Stopped if a stop was requested and work is left.

    Work that is left is an `unfinished` evaluation, or more steps.
    """
    if collectives.all_reduce_max(stop.asked) and (unfinished or state.step < state.end):
        saved = checkpoint.save(state, report.run.path)
        raise Stopped(f"stopped after step {state.step}, saved {saved}", hint="continue with --resume")


@contextlib.contextmanager
def _abandonable(state: TrainState, report: Report, stop: StopRequests) -> Iterator[None]:
    """Run an evaluation that a stop request may abandon.

    An abandoned evaluation leaves no trace, so the resumed run repeats it; the random state is restored for that.
    """
    rng_state = rng.state()
    try:
        with stop.abandonable():
            yield
    except EvaluationAbandoned:
        rng.restore(rng_state)
        _stop_if_requested(state, report, stop, unfinished=True)


def _train_on_batch(state: TrainState, report: Report, step: int) -> None:
    started = time.perf_counter()
    collected = collect_rollouts(state, state.data.batch_rows(step), ("rollout", step))
    collected_at = time.perf_counter()
    passing, shares = filter_rollouts(state.spec.rollout.keep, collected.batch, partial(completion_text, state))
    batch = prepare_rollouts(state, passing)
    prepared_at = time.perf_counter()
    parts = batch.split(state.plan.updates_per_step)
    results = [_update(state, report, collected, part) for part in parts if collectives.all_reduce_max(len(part))]
    teacher_moved = results and state.teacher and state.teacher.after_rollout_batch(state.masters, state.scalar)
    state.step = step + 1
    seconds = time.perf_counter() - started
    metrics = step_metrics(state, collected, results, shares, len(batch), seconds)
    metrics["time/measure"] = prepared_at - collected_at
    if teacher_moved and state.teacher:
        metrics["teacher_distance"] = state.teacher.distance
    report.step(state, collected, metrics)


def _update(state: TrainState, report: Report, collected: CollectedRollouts, part: RolloutBatch) -> StepResult:
    try:
        result = train_step(state, part)
    except LossNotFinite:
        raise _numerics_failure(state, report, collected, part, "the loss is not finite") from None
    state.skipped = 0 if result.applied else state.skipped + 1
    if state.skipped >= SKIPS_ALLOWED:
        what = f"{SKIPS_ALLOWED} optimizer steps in a row had a gradient that is not finite"
        raise _numerics_failure(state, report, collected, part, what)
    return result


def _numerics_failure(
    state: TrainState, report: Report, collected: CollectedRollouts, part: RolloutBatch, what: str
) -> NumericsGuard:
    folder = report.bad_batch(state, collected, part)
    step = checkpoint.newest_step(report.run.path)
    return NumericsGuard(
        f"{what}, in step {state.step + 1}, on the rollouts in {folder}",
        hint=f"`sdkit replay {report.run.path}@{step}` trains on them again; lower optimizer.lr, or set model.dtype: "
        "float32",
    )


def _evaluation_due(state: TrainState) -> bool:
    evaluation = state.spec.evaluation
    if evaluation is None:
        return False
    return state.step == state.end or bool(evaluation.every and state.step % evaluation.every == 0)


def _evaluate(state: TrainState, report: Report, stop: StopRequests) -> EvaluationResult | None:
    if state.spec.evaluation is None:
        return None
    started = time.perf_counter()
    with _abandonable(state, report, stop):
        result = evaluate(state)
        losses = held_out_loss(state)
    keep_best(state, report.run, result.metrics(headline(state)) | losses)
    report.evaluated(state, result, losses, time.perf_counter() - started)
    _stop_if_requested(state, report, stop)
    return result
