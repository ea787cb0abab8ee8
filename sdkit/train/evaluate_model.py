"""`sdkit eval`: the evaluation of a spec on its start model, or on the model of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sdkit.distributed import health, zero
from sdkit.language.errors import UnreadableInput
from sdkit.language.specs import ExperimentSpec
from sdkit.runs import directory
from sdkit.runs.evaluations import EvaluationResult
from sdkit.runs.provenance import this_process
from sdkit.runs.samples import as_markdown
from sdkit.runs.score_tables import measure_records, measures_table, score_records, scores_table, warn_of_few_prompts
from sdkit.stdout import Phases, is_first_rank
from sdkit.train import failures, panel, prompt_record, run_origin
from sdkit.train.evaluate import evaluate, merge, number_of_completions
from sdkit.train.run import open_run

PAGE_RECORDS = 20
"""Completions of each suite and decoding on the page that is written."""


def evaluate_model(
    spec: ExperimentSpec, base: Path, console: Console, run: Path | None = None, phases: Phases | None = None
) -> EvaluationResult:
    """Run the spec's evaluation on its start model, and print the scores.

    With `run`, templates print the run's date, and a warning names code that has changed since.
    """
    if run:
        run_origin.warn_of_changed_code(spec, base, run, console)
    phases = phases or Phases(console)
    with phases.phase("loading data and models"):
        trainer = open_run(spec, base, now=run and prompt_record.template_date(directory.provenance(run)))
    together = False
    try:
        assert spec.evaluation is not None
        total = number_of_completions(trainer.setup.data, spec.evaluation.suites) + panel.amount_of_work(trainer.setup)
        with phases.phase("evaluation", total) as advance, failures.explained():
            result = evaluate(trainer.sampler, spec.evaluation, 0, advance)
            if spec.evaluation.panel:
                result = merge([result, panel.evaluate_panel(trainer.sampler, 0, console, advance)])
        console.print(scores_table(result))
        if table := measures_table(result.measure_means()):
            console.print(table)
        warn_of_few_prompts(console, result)
        together = True
        return result
    finally:
        if not together:
            health.fail()
        trainer.close(together=together)
        zero.stop(together=together)


def report(spec: ExperimentSpec, result: EvaluationResult) -> dict[str, Any]:
    """The scores and measures with their intervals, what was evaluated and by which command, as JSON values."""
    model = {"path": spec.model.path, "revision": spec.model.revision}
    return {"model": model, **this_process(), "scores": score_records(result), "measures": measure_records(result)}


def check_target(folder: Path) -> None:
    """Raise UnreadableInput if `folder` exists: `write` makes a new one."""
    if folder.exists() or folder.is_symlink():
        raise UnreadableInput(f"{folder} exists", hint="name another with --to")


def write(folder: Path, spec_text: str, facts: Mapping[str, Any], result: EvaluationResult) -> None:
    """Write scores, spec and every completion to the new folder; on ranks other than the first, do nothing.

    evaluation.json     what `report` returns          completions.jsonl   each completion with its scores
    spec.yaml           the resolved spec              completions.md      the first of them, to read
    """
    if not is_first_rank():
        return
    check_target(folder)  # again: another command may have written there meanwhile
    target = directory.create(folder)
    target.write_json("evaluation.json", facts)
    target.write_text("spec.yaml", spec_text)
    target.json_lines("completions.jsonl", result.records)
    shown: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in result.records:
        shown.setdefault((record["suite"], record["decoding"]), []).append(record)
    first = [record for records in shown.values() for record in records[:PAGE_RECORDS]]
    target.write_text("completions.md", as_markdown("completions", first))
