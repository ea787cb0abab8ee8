"""Reports a run: prints to the console and writes to the run directory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdkit.batches import RolloutBatch
from sdkit.distributed import collectives
from sdkit.language.errors import counted
from sdkit.language.resolved import leaves, resolved
from sdkit.models.device import rank_device
from sdkit.models.packing import LONGEST_PACK
from sdkit.runs import retention
from sdkit.runs.directory import RunDirectory
from sdkit.runs.evaluations import EvaluationResult, Key, interval_note, read_back, signed
from sdkit.runs.intervals import Interval
from sdkit.runs.samples import as_markdown
from sdkit.runs.score_tables import comparison_records, comparison_table, score_changes, warn_of_few_prompts
from sdkit.stdout import Advance, Phases, print_warning
from sdkit.train.collate import RolloutKey, rollout_key
from sdkit.train.collect_rollouts import CollectedRollouts, rollout_records, sample_texts, sort_records
from sdkit.train.divergence import DivergenceWatch, fallen_score, has_collapsed
from sdkit.train.evaluate import headline
from sdkit.train.inputs import RunData
from sdkit.train.models import Models
from sdkit.train.setup import RunSetup
from sdkit.train.tripwires import triggered

STEP_LINE = 80 - len("00:00:00 ")
"""Characters of a step's line: it fits 80 columns, also in a log, whose lines begin with the time."""
RESULTS = ("loss", "eval/score", "eval/loss")
"""The metrics that TensorBoard's table of runs shows, from the last step that has them."""
NO_SETTINGS = ("data.source", "output.", "evaluation.suites", "evaluation.panel")
"""Keys that are left out of that table."""
FALLEN_SCORE_ADVICE = "end the run earlier or lower optimizer.lr; output.keep_best: score saves the best model"


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
        self.recent_steps = [line for line in history if "time/step" in line]  # for the tripwires
        patience = setup.spec.output.tripwire_steps
        self.watch = DivergenceWatch(patience, self.recent_steps) if patience else None
        scores = {line["step"]: line["eval/score"] for line in history if "eval/score" in line}
        at_best = run.records("evaluations", max(scores, key=scores.__getitem__)) if scores else []
        self.best = read_back(at_best) if at_best else None
        self.collapse: str | None = None  # how far the score of the last evaluation is below its best
        # Tokens sampled for training so far.
        self.generated = max((line.get("tokens_generated", 0.0) for line in history), default=0.0)
        # How long the latest step and evaluation took.
        names = ("time/step", "time/evaluation")
        self.seconds = {name: line[name] for line in history for name in names if name in line}

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
        self.run.status("running", step=step)
        records = collectives.gather_object(rollout_records(collected, divergences))
        self.run.lines("rollouts", step - 1, sort_records(records))
        self.console.print(_step_line(step, self.setup.end, metrics), no_wrap=True)
        output = self.setup.spec.output
        self._warn_of_tripwires(step, metrics, output.tripwire_steps)
        for text in server_messages:
            self.run.warning(step, {"wire": "rollout_server", "cause": text})
        if (step - 1) % output.samples_every == 0:
            shown = sample_texts(self.setup.data, collected.batch, collected.scores, output.samples)
            page = as_markdown(f"samples of step {step}", shown)
            self.run.lines("samples", step, shown)
            self.run.write_text(f"samples/step_{step:06d}.md", page)
            self.run.event_text("samples", step, page)
            self.console.print(f"  [dim]sample:[/] {escape(_one_line(shown[0]['completion']))}", highlight=False)

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

    def _warn_of_tripwires(self, step: int, metrics: Mapping[str, float], patience: int | None) -> None:
        """Print a warning, and add a line to warnings.jsonl, for each tripwire that triggers at this step."""
        if patience is None:
            return
        self.recent_steps = [*self.recent_steps[-patience:], {"step": step, **metrics}]
        diverging = self.watch and self.watch.add(self.recent_steps[-1])
        for trip in [*triggered(self.recent_steps, patience), *([diverging] if diverging else [])]:
            facts = {"since": trip.first, "wire": trip.wire, "cause": trip.cause}
            self.run.warning(step, facts | {"look_at": trip.look_at})
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
        for text in _evaluation_lines(step, result, seconds):
            self.console.print(text, highlight=False)
        self._compare_with_best(step, result)

    def _compare_with_best(self, step: int, result: EvaluationResult) -> None:
        """Warn if the headline score has fallen from its best by more than chance."""
        key, best = self._headline, self.best
        self.collapse = None
        if best is None or result.interval(key).mean >= best.interval(key).mean:
            self.best = result
            return
        fall = self.watch and fallen_score(best, result, key, len(self.evaluated_at))
        if fall:
            self.collapse = fall if has_collapsed(best, result, key) else None
            self.run.warning(step, {"wire": "fallen_score", "cause": fall, "look_at": FALLEN_SCORE_ADVICE})
            print_warning(self.console, fall, FALLEN_SCORE_ADVICE)

    def divergence(self) -> str | None:
        """How the run has diverged by now, the same on every rank; None if it has not."""
        causes = self.watch and self.watch.verdict(), self.collapse
        return collectives.broadcast_object("; ".join(filter(None, causes)) or None)

    def lift(self, lift: Mapping[Key, Interval]) -> None:
        """Report the teacher's lift, measured before training."""
        if not lift:
            return
        columns = ("suite", "decoding", "score", "lift", "95 % interval", "prompts")
        title = "teacher lift: score under the teacher's view minus the student's, before training"
        table = Table(*columns, title=title, caption=interval_note(i.method for i in lift.values()))
        for (suite, decoding, reward), interval in lift.items():
            table.add_row(suite, decoding, reward, *signed(interval), str(interval.n))
        self.console.print(table)
        if all(interval.low <= 0 for interval in lift.values()):
            text = "the teacher's view lifts no score clearly above the student's; there may be nothing to distil"
            print_warning(self.console, text)
        named = {"lift/" + "/".join(key): interval.mean for key, interval in lift.items()}
        self.run.metrics(0, named)

    def finished(self) -> None:
        """Print the table of scores before and after training, and write result.json, if the run has both scores.

        Also write the settings and results to TensorBoard.
        """
        if self.first and self.last and self.first is not self.last:
            changes = score_changes(self.first, self.last)
            self.console.print(comparison_table(changes, self._headline))
            warn_of_few_prompts(self.console, self.last)
            self.run.write_json("result.json", comparison_records(changes))
            if figures := retention.changes(self.first, self.last):
                self.console.print(retention.retention_table({"": figures}))
                self.run.write_json("retention.json", retention.retention_records(figures))
        lines = self.run.history()
        results = {name: line[name] for line in lines for name in RESULTS if name in line}
        settings = {".".join(map(str, path)): value for path, value in leaves(resolved(self.setup.spec))}
        shown = {name: value for name, value in settings.items() if not name.startswith(NO_SETTINGS)}
        self.run.hyperparameters(shown, results, max((line["step"] for line in lines), default=0))

    @property
    def panel(self) -> set[str]:
        """The suites of the panel, as far as they are evaluated."""
        return set(self.first.panel) if self.first else set()

    @property
    def _headline(self) -> Key:
        assert self.setup.spec.evaluation is not None
        return headline(self.setup.spec.evaluation)


def print_objective_card(
    console: Console, setup: RunSetup, models: Models, run: RunDirectory, *, start: int = 0
) -> None:
    """Print the objective card, which says in words what is trained from step `start` on, and warnings about the data."""
    plan, spec, data = setup.plan, setup.spec, setup.data
    lines = [f"[bold]{escape(line)}[/]" for line in plan.objective]
    lines += [escape(line) for line in plan.roles]
    lines += [f"[dim]derived: {escape(line)}[/]" for line in plan.derived]
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


def _step_line(step: int, end: int, metrics: Mapping[str, float]) -> Text:
    """The main figures of a step on one line of at most `STEP_LINE` characters; what does not fit is left out."""
    trained = "[yellow]no rollout kept, no update[/]"
    if "loss" in metrics:
        trained = f"loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.2f}"
    skipped = "  [red]skipped[/]" if metrics["skipped_steps"] else ""
    line = Text.from_markup(f"step [bold]{step}[/]/{end}  {trained}")
    last = Text.from_markup(f"  [dim]{metrics['time/step']:.1f} s[/]{skipped}")
    parts = [f"  length {metrics['rollout/completion_tokens']:.1f}"]
    parts += [f"  {k.removeprefix('reward/')} {v:.2f}" for k, v in metrics.items() if k.startswith("reward/")]
    room = STEP_LINE - last.cell_len
    for i, part in enumerate(parts):
        more = "  …" if i + 1 < len(parts) else ""
        if line.cell_len + cell_len(part + more) > room:
            line.append("  …" if line.cell_len + len("  …") <= room else "")
            break
        line.append(part)
    return line.append_text(last)


def _evaluation_lines(step: int, result: EvaluationResult, seconds: float) -> list[str]:
    """A line of scores for each suite of the task, with the suite's name if there are several, and one for the panel."""
    suites = [suite for suite in result.sizes if suite not in result.panel]
    lines: list[str] = []
    for suite in suites:
        name = f"evaluation after step {step}" + (f", {escape(suite)}" if len(suites) > 1 else "")
        scores = [f"{'/'.join(key[1:])} {result.interval(key).mean:.3f}" for key in result.scores if key[0] == suite]
        lines.append(f"[cyan]{name}[/]: {escape(', '.join(scores))}")
    if figures := retention.means(result):
        scores = ", ".join(f"{name} {mean:.3f}" for name, mean in figures.items())
        lines.append(f"[cyan]evaluation after step {step}, panel[/]: {escape(scores)}")
    lines[-1] += f" [dim]({seconds:.0f} s)[/]"
    return lines


def _one_line(text: str) -> str:
    flat = " ⏎ ".join(text.splitlines())
    return flat if len(flat) <= 160 else flat[:157] + "…"
