"""Writes the model card (README.md) of an exported model: training, held-out scores, data and versions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdkit.language.bundled import PREFIX, local_folder
from sdkit.language.resolved import canonical_hash
from sdkit.language.source import read
from sdkit.language.specs import ExperimentSpec, ModelSpec
from sdkit.plan.plan import MethodPlan, plan_method
from sdkit.runs.directory import origin
from sdkit.runs.evaluations import few_prompts_warning, interval_note
from sdkit.runs.history import accepted_changes


def base_of(spec: ModelSpec, base: Path) -> str:
    """The start model as the spec names it; a local folder as an absolute path."""
    return str(local_folder(spec.path, base) or spec.path)


def write(spec: ExperimentSpec, base: Path, run: Path, *, adapter: bool) -> str:
    """The card's text.  A local start model appears by its folder's name only, since cards are published."""
    facts, method = origin(run), plan_method(spec)
    path = base_of(spec.model, base)
    local = Path(path).is_absolute()
    start = Path(path).name if local else path
    what = f"LoRA adapter for `{start}`" if adapter else f"`{start}`"
    sections = {
        "Training": _bullets(_training(spec, run, method)),
        "Held-out scores": _scores(run),
        "New skill and retention": _retention(run),
        "Origin": _bullets(_origin(spec, facts, start)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    on_hub = None if local or path.startswith(PREFIX) else path
    head = _front_matter(on_hub, adapter)
    return f"---\n{head}---\n\n# {run.resolve().name}\n\n{what}, trained with sdkit.\n\n{body}\n"


def _front_matter(on_hub: str | None, adapter: bool) -> str:
    """The metadata that the Hugging Face hub reads, as YAML."""
    facts: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sdkit", "lora"] if adapter else ["sdkit"],
    }
    return yaml.safe_dump(facts | ({"base_model": on_hub} if on_hub else {}), sort_keys=False)


def _training(spec: ExperimentSpec, run: Path, method: MethodPlan) -> Iterator[str]:
    if page := method_page(run):
        yield f"method: `{page}`"
    yield from (f"objective: {line}" for line in method.objective)
    yield from method.roles
    lora = spec.model.lora
    if lora:
        base = f", over base weights in {lora.quantize_base}" if lora.quantize_base else ""
        yield f"LoRA: rank {lora.r}, alpha {lora.lora_alpha:g}{base}"
    per_step = spec.training.prompts_per_step * spec.rollout.completions_per_prompt
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    if status.get("state") == "diverged":
        yield str(status["reason"])
    yield f"{status['step']} steps of {per_step} rollouts, learning rate {spec.optimizer.lr:g}, {spec.model.dtype}"


def method_page(run: Path) -> str | None:
    """Returns the page that the run file names; None if the file holds the method itself."""
    written = read(run / "spec.yaml").data if (run / "spec.yaml").is_file() else None
    return written.get("method") if isinstance(written, Mapping) else None


def _scores(run: Path) -> str:
    """The run's table of scores before and after training; empty if nothing was evaluated."""
    path = run / "result.json"
    if not path.is_file():
        return ""
    records = json.loads(path.read_text(encoding="utf-8"))
    notes = [_intervals_are(records)]
    if few := few_prompts_warning({row["suite"]: row["n"] for row in records}):
        notes.append(f"Warning: {few}.")
    return "\n".join([*_table(records, ("suite", "decoding", "score"), "n"), *notes])


def _retention(run: Path) -> str:
    """The run's table of new skill and retention; empty without a panel."""
    path = run / "retention.json"
    if not path.is_file():
        return ""
    records = json.loads(path.read_text(encoding="utf-8"))
    what = "New skill is the mean of the task's suites, retention that of the panel's entries."
    return "\n".join([*_table(records, ("figure",), "prompts"), f"{what} {_intervals_are(records)}"])


def _table(records: Sequence[Mapping[str, Any]], names: Sequence[str], count: str) -> list[str]:
    """The lines of a table of scores before and after training, and an empty one."""
    columns = ("before", "after", "change")
    header = [*names, *columns, count]
    rows = [
        [*(row[name] for name in names), *("{:.3f} [{:.3f}, {:.3f}]".format(*row[c]) for c in columns), row["n"]]
        for row in records
    ]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def _intervals_are(records: Sequence[Mapping[str, Any]]) -> str:
    methods = (method for row in records for method in row.get("methods", {}).values())
    return f"Intervals are {interval_note(methods)}."


def _origin(spec: ExperimentSpec, facts: Mapping[str, Any], start: str) -> Iterator[str]:
    model = facts.get("model", {})
    pinned = model.get("commit") or model.get("revision")
    yield f"start model: `{start}`" + (f" at {pinned}" if pinned else "")
    for name, digest in facts.get("data", {}).items():
        yield f"data, {name}: SHA-256 `{digest}`"
    yield f"spec: SHA-256 `{canonical_hash(spec)}` of its resolved form"
    if git := facts.get("git"):
        changed = ", with uncommitted changes" if git["changed"] else ""
        yield f"commit of the spec: `{git['commit']}`{changed}"
    for name, step in accepted_changes(facts).items():
        yield f"changed during the run, after step {step}: `{Path(name).name}`"
    if replayed := facts.get("replayed"):
        yield f"rollouts: recorded by the run {Path(replayed['run']).name}, from step {replayed['start']} on"
    versions = {"python": facts.get("python"), **facts.get("versions", {})}
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _bullets(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
