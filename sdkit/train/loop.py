"""The training loop.  Each step collects rollouts, trains on them, updates the teacher and, when due, evaluates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sdkit.batches import RolloutBatch
from sdkit.checkpoints import checkpoint, rng
from sdkit.checkpoints.best import keep_best
from sdkit.distributed import collectives
from sdkit.language.best_metric import best_metric
from sdkit.language.errors import NumericsGuard, Stopped
from sdkit.language.schedules import at_step
from sdkit.runs.evaluations import EvaluationResult
from sdkit.stdout import Advance
from sdkit.train import determinism, panel, stop_requests
from sdkit.train.collect_rollouts import CollectedRollouts, collect_rollouts, completion_text
from sdkit.train.evaluate import evaluate, headline, held_out_loss, merge, number_of_completions, teacher_lift
from sdkit.train.metrics import step_metrics
from sdkit.train.report import Report
from sdkit.train.rollout_filters import filter_rollouts
from sdkit.train.step import LossNotFinite, StepResult, train_step, update_teacher
from sdkit.train.stop_requests import EvaluationAbandoned, StopRequests
from sdkit.train.token_statistics import prepare_rollouts
from sdkit.train.trainer import Trainer

SKIPS_ALLOWED = 3
"""A run ends after this many skipped optimizer steps in a row."""


def run(trainer: Trainer, report: Report) -> None:
    """Train from the current step to the last; evaluate at the start, at the end and in between.

    Ends early, with a checkpoint, if a tripwire says so.  On SIGINT or SIGTERM, saves a checkpoint and raises Stopped.  Raises
    NumericsGuard before an optimizer step whose loss is not finite, and after SKIPS_ALLOWED steps in a row whose gradient is
    not finite.
    """
    setup, progress = trainer.setup, trainer.progress
    every = setup.spec.output.checkpoint_every
    left = report.time_left
    training = report.phases.phase("training", setup.end, done=progress.step, log=False, time_left=left.seconds)
    with stop_requests.stop_requests(report.notify) as stop, training as advance:
        _evaluate_start(trainer, report, stop)
        for step in range(progress.step, setup.end):
            with stop.during("this step", report.seconds.get("time/step")):
                _train_on_batch(trainer, report, step)
            advance(1)
            _stop_if_requested(trainer, report, stop)
            if _evaluation_due(trainer):
                _evaluate(trainer, report, stop)
            tripped = report.stopped()
            due = tripped or (every and progress.step % every == 0)
            if due and progress.step < setup.end:
                with stop.during("the checkpoint is saved"), report.part("saving a checkpoint"):
                    saved = checkpoint.save(trainer.state, report.run.path, setup.spec)
                if not tripped:
                    _stop_if_requested(trainer, report, stop, saved=saved)
            if tripped:
                return


def _evaluate_start(trainer: Trainer, report: Report, stop: StopRequests) -> None:
    """Run the evaluation due before the next step: at the start of the run, or one that a stop request cut off."""
    step, evaluation = trainer.progress.step, trainer.setup.spec.evaluation
    if step and not _evaluation_due(trainer):
        return
    baseline = report.first if step in report.evaluated_at else _evaluate(trainer, report, stop)
    if step or evaluation is None or baseline is None or report.lifted:
        return
    with _abandonable(trainer, report, stop), report.part("teacher lift"):
        lift = teacher_lift(trainer.sampler, evaluation, baseline, trainer.specs)
    report.lift(lift)


def _stop_if_requested(
    trainer: Trainer, report: Report, stop: StopRequests, *, unfinished: bool = False, saved: Path | None = None
) -> None:
    """Save a checkpoint, unless this step's is `saved` already, and raise Stopped if a stop was requested and work is left.

    Work that is left is an `unfinished` evaluation, or more steps.
    """
    setup, step = trainer.setup, trainer.progress.step
    if collectives.all_reduce_max(stop.asked) and (unfinished or step < setup.end):
        saved = saved or checkpoint.save(trainer.state, report.run.path, setup.spec)
        raise Stopped(f"stopped after step {step}, saved {saved}", hint="continue with --resume")


@contextlib.contextmanager
def _abandonable(trainer: Trainer, report: Report, stop: StopRequests) -> Iterator[None]:
    """Run an evaluation that a stop request may abandon.

    An abandoned evaluation leaves no trace, so the resumed run repeats it; the random state is restored for that.
    """
    rng_state = rng.state()
    try:
        with stop.during("this evaluation", report.seconds.get("time/evaluation")), stop.abandonable():
            yield
    except EvaluationAbandoned:
        rng.restore(rng_state)
        _stop_if_requested(trainer, report, stop, unfinished=True)


def _train_on_batch(trainer: Trainer, report: Report, step: int) -> None:
    setup, sampler, specs = trainer.setup, trainer.sampler, trainer.specs
    started = time.perf_counter()
    rows = setup.data.batch_rows(step)
    with report.part("rollouts", len(rows) * setup.spec.rollout.completions_per_prompt) as advance:
        collected = collect_rollouts(sampler, rows, ("rollout", step), specs, advance=advance)
        sampler.backends.sleep()
    collected_at = time.perf_counter()
    decode = partial(completion_text, setup.data)
    passing, shares = filter_rollouts(setup.spec.rollout.keep, collected.batch, decode)
    with determinism.kernels(setup.spec.training.deterministic):
        with report.part("token statistics"):
            batch = prepare_rollouts(trainer.learner, passing, specs, with_old_logprobs=setup.plan.needs_old_logprobs)
        prepared_at = time.perf_counter()
        parts = batch.split(setup.plan.updates_per_step)
        with report.part("updates", len(parts)) as advance:
            results = [_update(trainer, report, collected, part, advance) for part in parts if _on_any_rank(part)]
        version = trainer.progress.optimizer_steps
        weights = setup.spec.teacher and at_step(setup.spec.teacher.weights, version)
        distance = update_teacher(trainer.learner, weights, "rollout_batch", version) if results else {}
    trainer.progress.step = step + 1
    seconds = time.perf_counter() - started
    metrics = step_metrics(setup.data, collected, results, shares, len(batch), version, seconds)
    metrics |= {"time/measure": prepared_at - collected_at} | distance
    divergences = {key: values for result in results for key, values in result.divergences.items()}
    report.step(step + 1, collected, metrics, sampler.backends.server_messages(), divergences)


def _on_any_rank(part: RolloutBatch) -> bool:
    """Whether any rank has rollouts of this update."""
    return bool(collectives.all_reduce_max(len(part)))


def _update(
    trainer: Trainer, report: Report, collected: CollectedRollouts, part: RolloutBatch, advance: Advance
) -> StepResult:
    try:
        result = train_step(trainer.learner, part, trainer.specs)
    except LossNotFinite:
        raise _numerics_failure(trainer, report, collected, part, "the loss is not finite") from None
    trainer.progress.record(applied=result.applied)
    advance(1)
    if trainer.progress.skipped >= SKIPS_ALLOWED:
        what = f"{SKIPS_ALLOWED} optimizer steps in a row had a gradient that is not finite"
        raise _numerics_failure(trainer, report, collected, part, what)
    return result


def _numerics_failure(
    trainer: Trainer, report: Report, collected: CollectedRollouts, part: RolloutBatch, what: str
) -> NumericsGuard:
    step = trainer.progress.step
    folder = report.bad_batch(step, collected, part)
    saved = checkpoint.newest_step(report.run.path)
    return NumericsGuard(
        f"{what}, in step {step + 1}, on the rollouts in {folder}",
        hint=f"`sdkit replay {report.run.path}@{saved}` trains on them again; lower optimizer.lr, or set model.dtype: "
        "float32",
    )


def _evaluation_due(trainer: Trainer) -> bool:
    evaluation, step = trainer.setup.spec.evaluation, trainer.progress.step
    if evaluation is None:
        return False
    return step == trainer.setup.end or bool(evaluation.every and step % evaluation.every == 0)


def _evaluate(trainer: Trainer, report: Report, stop: StopRequests) -> EvaluationResult | None:
    spec, step, specs = trainer.setup.spec, trainer.progress.step, trainer.specs
    if spec.evaluation is None:
        return None
    started = time.perf_counter()
    with_panel = panel.is_due(spec.evaluation, step, trainer.setup.end)
    total = number_of_completions(trainer.setup.data, spec.evaluation.suites)
    total += panel.amount_of_work(trainer.setup) if with_panel else 0
    bar = report.phases.phase(f"evaluation after step {step}", total)
    with _abandonable(trainer, report, stop), bar as advance:
        result = evaluate(trainer.sampler, spec.evaluation, specs.optimizer_steps, advance)
        if with_panel:
            result = merge(
                [result, panel.evaluate_panel(trainer.sampler, specs.optimizer_steps, report.console, advance)]
            )
        trainer.sampler.backends.sleep()
        losses = held_out_loss(trainer.sampler, trainer.learner, spec.evaluation, specs)
    if metric := best_metric(spec):
        metrics = result.metrics(headline(spec.evaluation)) | losses
        keep_best(metric, step, metrics, trainer.models.student, trainer.setup.data.tokenizer, report.run)
    report.evaluated(step, result, losses, time.perf_counter() - started)
    _stop_if_requested(trainer, report, stop)
    return result
