"""Reports a run: prints to the console and writes to the run directory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from sdkit.batches import RolloutBatch
from sdkit.distributed import collectives
from sdkit.language.errors import counted
from sdkit.language.resolved import leaves, resolved
from sdkit.models.device import rank_device
from sdkit.models.packing import LONGEST_PACK
from sdkit.plan.plan import Plan
from sdkit.runs import retention
from sdkit.runs.directory import RunDirectory
from sdkit.runs.evaluations import EvaluationResult, Key, read_back
from sdkit.runs.samples import as_markdown
from sdkit.runs.score_tables import (
    comparison_records,
    comparison_table,
    measure_changes,
    measure_changes_table,
    score_changes,
    turn_rows,
    turns_table,
    warn_of_few_prompts,
)
from sdkit.runs.teacher_lift import ADVICE as LIFT_ADVICE
from sdkit.runs.teacher_lift import TeacherLift
from sdkit.stdout import Advance, Phases, print_warning, readable_duration
from sdkit.train import console_lines
from sdkit.train.collate import RolloutKey, rollout_key
from sdkit.train.collect_rollouts import CollectedRollouts, rollout_records, sample_texts, sort_records
from sdkit.train.evaluate import headline
from sdkit.train.inputs import RunData
from sdkit.train.models import Models
from sdkit.train.run_watch import RunWatch
from sdkit.train.setup import RunSetup
from sdkit.train.time_left import TimeLeft
from sdkit.train.tripwires import TripwireWarning

RESULTS = ("loss", "eval/score", "eval/loss")
"""The metrics that a tracker's table of runs shows, from the last step that has them."""
NO_SETTINGS = ("data.source", "output.", "evaluation.suites", "evaluation.panel")
"""Keys that are left out of that table."""


class Report:
    """Reports one run to the console and its run directory."""

    def __init__(self, run: RunDirectory, console: Console, setup: RunSetup, phases: Phases | None = None) -> None:
        self.run = run
        self.console = console
        self.phases = phases or Phases(console)
        self.setup = setup
        at_start = run.records("evaluations", 0)
        self.first: EvaluationResult | None = read_back(at_start) if at_start else None
        self.last: EvaluationResult | None = None
        history = run.history()
        # Only the first rank reads the run directory; the others use what it read.
        self.evaluated_at = collectives.broadcast_object({line["step"] for line in history if "eval/score" in line})
        self.lifted = collectives.broadcast_object(any(key.startswith("lift/") for line in history for key in line))
        self.watch = RunWatch(setup.spec.output, run, history)
        # Tokens sampled for training so far.
        self.generated = max((line.get("tokens_generated", 0.0) for line in history), default=0.0)
        # How long the latest step and evaluation took.
        names = ("time/step", "time/evaluation")
        self.seconds = {name: line[name] for line in history for name in names if name in line}
        self.time_left = TimeLeft(setup.end, setup.spec.evaluation, self.seconds.get("time/evaluation", 0.0))

    def part(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
        """Show a part of a step on a terminal; returns what `Phases.phase` returns."""
        return self.phases.phase(name, total, log=False)

    def notify(self, text: str) -> None:
        """Print an answer to a signal."""
        with contextlib.suppress(RuntimeError):  # the signal came while the same stream was being written
            self.console.print(f"[yellow]{text}[/]", highlight=False)

    def step(
        self,
        step: int,
        collected: CollectedRollouts,
        metrics: dict[str, float],
        server_messages: Sequence[str] = (),
        divergences: Mapping[RolloutKey, Sequence[float | None]] | None = None,
    ) -> None:
        """Report training step `step`: a console line, a line of metrics, all rollouts and, at intervals, samples."""
        self.generated += metrics["rollout/tokens"]
        metrics["tokens_generated"] = self.generated
        metrics |= memory_peaks()
        self.seconds["time/step"] = metrics["time/step"]
        self.run.metrics(step, metrics)
        self.run.status("running", step=step, steps=self.setup.end)
        records = collectives.gather_object(rollout_records(collected, divergences))
        self.run.lines("rollouts", step - 1, sort_records(records))
        self._print_step(step, metrics)
        output = self.setup.spec.output
        self._warn(self.watch.step({"step": step, **metrics}))
        for text in server_messages:
            self.run.warning(step, {"wire": "rollout_server", "cause": text})
        if (step - 1) % output.samples_every == 0:
            shown = sample_texts(self.setup.data, collected.batch, collected.scores, output.samples)
            page = as_markdown(f"samples of step {step}", shown)
            self.run.samples(step, shown, page)
            self.console.print(
                f"  [dim]sample:[/] {escape(console_lines.one_line(shown[0]['completion']))}", highlight=False
            )

    def _print_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a step's line and, in a log, from time to time how long the run still takes."""
        terminal = self.console.is_terminal
        room = self.console.width if terminal else console_lines.LOG_LINE
        sampled = not self.setup.spec.rollout.sampled_by.completion_column or metrics.get("rollout/by_student") == 1
        line = console_lines.step_line(step, self.setup.end, metrics, room, sampled=sampled)
        self.console.print(line, no_wrap=True)
        self.time_left.step(step, metrics["time/step"])
        if not terminal and (left := self.time_left.due()):
            text = f"about {readable_duration(left)} left, {step} of {self.setup.end} steps done"
            self.console.print(f"[dim]{text}[/]", highlight=False)

    def bad_batch(self, step: int, collected: CollectedRollouts, part: RolloutBatch) -> Path:
        """Write the rollouts of a failed update to bad_batches/ and those of its step to rollouts/.

        `step` is the number of steps before it.  Returns the path of the former.
        """
        failed_keys = {rollout_key(r) for r in part}
        step_records = rollout_records(collected)
        failed = [r for r in step_records if (r["group"], r["completion_ids"]) in failed_keys]
        for folder, records in (("rollouts", step_records), ("bad_batches", failed)):
            self.run.lines(folder, step, sort_records(collectives.gather_object(records)))
        return self.run.file("bad_batches", step)

    def _warn(self, warnings: Sequence[TripwireWarning]) -> None:
        """Print a warning, and add a line to warnings.jsonl, for each tripwire that went off."""
        for trip in warnings:
            facts = {"since": trip.first, "wire": trip.wire, "cause": trip.cause, "look_at": trip.look_at}
            self.run.warning(trip.step, facts)
            print_warning(self.console, str(trip), trip.look_at)

    def evaluated(self, step: int, result: EvaluationResult, losses: Mapping[str, float], seconds: float) -> None:
        """Report the evaluation after `step`: scores on the console, every completion to evaluations/."""
        self.first = self.first or result
        self.last = result
        self.evaluated_at.add(step)
        metrics = result.metrics(self._headline) | retention.metrics(result) | dict(losses)
        self.run.metrics(step, metrics | {"time/evaluation": seconds})
        self.run.lines("evaluations", step, result.records)
        self.seconds["time/evaluation"] = seconds
        self.time_left.evaluation(seconds)
        for text in console_lines.evaluation_lines(step, result, seconds):
            self.console.print(text, highlight=False)
        self._warn(self.watch.evaluated(step, result, self._headline))

    def stopped(self) -> str | None:
        """Why a tripwire ends the run after this step, the same on every rank; None if none does."""
        if not self.setup.spec.output.collapse.stops:
            return None
        return collectives.broadcast_object(self.watch.stop)

    def divergence(self) -> str | None:
        """How the run has diverged by now, the same on every rank; None if it has not."""
        return collectives.broadcast_object(self.watch.verdict())

    def lift(self, lift: TeacherLift) -> None:
        """Report the teacher's lift, measured before training: a table, a metric and every completion in lift.jsonl."""
        if not lift.pairs:
            return
        self.console.print(lift.table())
        if text := lift.warning():
            print_warning(self.console, text, LIFT_ADVICE)
            self.run.warning(0, {"wire": "no_lift", "cause": text, "look_at": LIFT_ADVICE})
        self.run.json_lines("lift.jsonl", lift.records)
        self.run.metrics(0, lift.metrics())

    def finished(self) -> None:
        """Print scores and measures before and after training, and write result.json and measures.json, if the run has both.

        Also give settings and results to the trackers.
        """
        if self.first and self.last and self.first is not self.last:
            changes = score_changes(self.first, self.last)
            self.console.print(comparison_table(changes, self._headline))
            self.run.write_json("result.json", comparison_records(changes))
            measures = measure_changes(self.first, self.last)
            if table := measure_changes_table(measures):
                self.console.print(table)
                self.run.write_json("measures.json", comparison_records(measures, "measure"))
            if turns := turn_rows(self.first, self.last):
                self.console.print(turns_table({"": turns}))
            if figures := retention.changes(self.first, self.last):
                self.console.print(retention.retention_table({"": figures}))
                self.run.write_json("retention.json", retention.retention_records(figures))
            warn_of_few_prompts(self.console, self.last)
        lines = self.run.history()
        results = {name: line[name] for line in lines for name in RESULTS if name in line}
        settings = {".".join(map(str, path)): value for path, value in leaves(resolved(self.setup.spec))}
        shown = {name: value for name, value in settings.items() if not name.startswith(NO_SETTINGS)}
        self.run.results(shown, results, max((line["step"] for line in lines), default=0))

    @property
    def panel(self) -> set[str]:
        """The suites of the panel, as far as they are evaluated."""
        return set(self.first.panel) if self.first else set()

    @property
    def _headline(self) -> Key:
        assert self.setup.spec.evaluation is not None
        return headline(self.setup.spec.evaluation)


def track_texts(run: RunDirectory, texts: Mapping[str, str], plan: Plan) -> None:
    """Give the trackers the spec, whose `texts` are named by file, and the objective."""
    for name, text in texts.items():
        run.tracked_text(name, 0, f"```yaml\n{text}\n```")
    run.tracked_text("objective", 0, "\n\n".join([*plan.objective, *plan.roles, *plan.derived]))


def print_objective_card(
    console: Console, setup: RunSetup, models: Models, run: RunDirectory, *, start: int = 0
) -> None:
    """Print the objective card, which says in words what is trained from step `start` on, and warnings about the data."""
    plan, spec, data = setup.plan, setup.spec, setup.data
    lines = [f"[bold]{escape(line)}[/]" for line in plan.objective]
    lines += [escape(line) for line in plan.roles]
    lines += [f"[dim]derived: {escape(line)}[/]" for line in plan.derived]
    if data.observations:
        lines += [f"[dim]derived: {escape(line)}[/]" for line in data.observations.describe()]
    if data.dropped:
        lines.append(f"[dim]derived: {data.dropped} training rows dropped, their prompts are held out[/]")
    for name, repeats in data.dropped_repeats.items():
        if repeats:
            prompts = len(data.suites[name])
            lines.append(f"[dim]derived: suite {name} has {prompts} different prompts, {repeats} repeats dropped[/]")
    if spec.training.share_prompts and not models.longest_pack:
        lines.append(
            "[dim]derived: every completion repeats its prompt, as this model's attention takes no shared rows[/]"
        )
    if 0 < models.longest_pack < min(LONGEST_PACK, 2 * setup.longest_sequence):
        lines.append(
            f"[dim]derived: completions share rows of up to {models.longest_pack} tokens, the reach of this model's attention[/]"
        )
    if not models.pads_samples:
        lines.append("[dim]derived: prompts are sampled one by one, as padding changes what this model samples[/]")
    steps = setup.end - start  # a replay or a resumed run may have fewer than the plan
    of_plan = "" if steps == plan.steps else f" of {plan.steps}"
    lines.append(
        f"{steps}{of_plan} steps × {spec.training.prompts_per_step} prompts × "
        f"{spec.rollout.completions_per_prompt} completions, {len(data.train)} training rows"
    )
    console.print(Panel("\n".join(lines), title=escape(str(run.path)), expand=False))
    warn_of_control_tokens(console, data)
    _warn_of_cut_completions(console, data, run, resumed=start > 0)


def warn_of_control_tokens(console: Console, data: RunData) -> None:
    """Print a warning if rows spell control tokens."""
    if rows := data.control_token_rows:
        shown = ", ".join(f"row {row.index} {name}" for row, name in rows[:5])
        text = f"control tokens in {counted(len(rows), 'row')}, which the model reads as such: {shown}"
        print_warning(console, text, "model.control_tokens: text keeps them as text")


def print_start_up(console: Console, seconds: Mapping[str, float]) -> None:
    """Print how long the parts of the start-up took, by name."""
    parts = ", ".join(f"{name} {part:.1f} s" for name, part in seconds.items())
    console.print(f"[cyan]start-up[/]: {parts}", highlight=False)


def _warn_of_cut_completions(console: Console, data: RunData, run: RunDirectory, *, resumed: bool) -> None:
    completions = data.completions
    text = completions and completions.warning(data.spec.rollout.max_new_tokens)
    if completions is None or text is None:
        return
    advice = f"set rollout.max_new_tokens: {completions.longest}, or drop these rows"
    print_warning(console, text, advice)
    if not resumed:  # a resumed run has warned already
        run.warning(0, {"wire": "cut_completions", "cause": text, "look_at": advice})


def memory_peaks() -> dict[str, float]:
    """The peak resident memory of this process, and of a GPU the largest peaks over all ranks, in GiB.

    `allocated` is what tensors took, `reserved` what PyTorch took from the GPU for them.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"memory/peak_gib": resident / 2**20 if sys.platform != "darwin" else resident / 2**30}
    device = rank_device()
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peaks["memory/device_allocated_gib"] = collectives.all_reduce_max(allocated) / 2**30
        peaks["memory/device_reserved_gib"] = collectives.all_reduce_max(reserved) / 2**30
    return peaks
