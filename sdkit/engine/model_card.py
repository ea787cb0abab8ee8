"""README.md of an exported model: what it is, what it was trained to do, from which data and versions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdkit.bundled import PREFIX
from sdkit.engine.rundir import origin
from sdkit.plan import plan_method
from sdkit.resolved import canonical_hash
from sdkit.source import read
from sdkit.specs import ExperimentSpec


def write(spec: ExperimentSpec, run: Path, *, adapter: bool) -> str:
    """The card's text.  Names no folder of this machine: a base is told by its hub id, or as the spec's path is."""
    facts, told = origin(run), plan_method(spec)
    name = run.resolve().name
    what = f"LoRA adapter for `{spec.model.path}`" if adapter else f"`{spec.model.path}`, trained"
    sections = {
        "Training": _listed(_training(spec, run, told.objective, told.roles)),
        "Held-out scores": _scores(run),
        "Origin": _listed(_origin(spec, facts)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{_front_matter(spec, adapter)}---\n\n# {name}\n\n{what} with sdkit.\n\n{body}\n"


def _front_matter(spec: ExperimentSpec, adapter: bool) -> str:
    """What the hub reads of a card."""
    facts: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sdkit", "lora"] if adapter else ["sdkit"],
    }
    if _on_hub(spec.model.path):
        facts["base_model"] = spec.model.path
    return yaml.safe_dump(facts, sort_keys=False)


def _on_hub(path: str) -> bool:
    """Whether a model's path can only be a hub id, owner/name."""
    owner, slash, name = path.partition("/")
    plain = "/" not in name and not path.startswith((PREFIX, ".", "~"))
    return bool(slash and owner and name) and plain


def _training(
    spec: ExperimentSpec, run: Path, objective: Sequence[str], roles: Sequence[str]
) -> Iterator[str]:
    page = _method_page(run)
    if page:
        yield f"method: `{page}`"
    yield from (f"objective: {line}" for line in objective)
    yield from roles
    lora = spec.model.lora
    if lora:
        yield f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}"
    per_step = spec.training.prompts_per_step * spec.rollout.completions_per_prompt
    yield f"{_steps(run)} steps of {per_step} rollouts, learning rate {spec.optimizer.lr:g}, {spec.model.dtype}"


def _steps(run: Path) -> int:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))["step"]


def _method_page(run: Path) -> str | None:
    """The page that the run file names; None where it brings its method along."""
    try:
        written = read(run / "spec.yaml").data
    except OSError:
        return None
    return written.get("method") if isinstance(written, Mapping) else None


def _scores(run: Path) -> str:
    """The run's table of before and after; empty where nothing was evaluated."""
    path = run / "result.json"
    if not path.is_file():
        return ""
    rows = [
        "| suite | decoding | score | before | after | change | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(path.read_text(encoding="utf-8")):
        figures = " | ".join(_figure(row[each]) for each in ("before", "after", "change"))
        rows.append(
            f"| {row['suite']} | {row['decoding']} | {row['score']} | {figures} | {row['n']} |"
        )
    return "\n".join(rows) + "\n\nIntervals are 95 % bootstrap intervals over prompts."


def _figure(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _origin(spec: ExperimentSpec, facts: Mapping[str, Any]) -> Iterator[str]:
    model = facts.get("model", {})
    pinned = model.get("commit") or model.get("revision")
    yield f"start model: `{spec.model.path}`" + (f" at {pinned}" if pinned else "")
    for name, digest in facts.get("data", {}).items():
        yield f"data, {name}: SHA-256 `{digest}`"
    yield f"spec: SHA-256 `{canonical_hash(spec)}` of its resolved form"
    if git := facts.get("git"):
        changed = ", with uncommitted changes" if git["changed"] else ""
        yield f"commit of the spec: `{git['commit']}`{changed}"
    if replayed := facts.get("replayed"):
        yield f"rollouts: recorded by the run {Path(replayed['run']).name}, from step {replayed['start']} on"
    versions = {"python": facts.get("python"), **facts.get("versions", {})}
    yield "versions: " + ", ".join(f"{name} {each}" for name, each in versions.items())


def _listed(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
