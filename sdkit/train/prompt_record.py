"""Records the rendered prompts of a run: the date that templates print, and hashes to recognize the prompts later."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.language.errors import UnreadableInput, listed
from sdkit.language.specs import ExperimentSpec, ReplayBackend
from sdkit.runs import directory

if TYPE_CHECKING:
    from sdkit.train.inputs import RunData
    from sdkit.train.replay import Recording


def provenance_entry(data: RunData) -> dict[str, Any]:
    """The `prompts` entry of provenance.json."""
    return {
        "date": data.prompter.now.isoformat(),
        "rows": data.rows_used,
        "sha256": data.prompt_fingerprints(data.rows_used),
    }


def template_date(provenance: Mapping[str, Any]) -> datetime | None:
    """The date that a run's chat template prints; None if `provenance` is empty."""
    prompts = provenance.get("prompts")
    if prompts:
        return datetime.fromisoformat(prompts["date"])
    started = provenance.get("started")  # for runs that did not record it
    return started and datetime.fromisoformat(started).astimezone().replace(tzinfo=None)


def recorded_date(spec: ExperimentSpec, base: Path, recording: Recording | None) -> datetime | None:
    """The date of the run whose rollouts are replayed; None if none are."""
    if recording:
        return template_date(recording.origin)
    backend = spec.rollout.backend
    if isinstance(backend, ReplayBackend):
        return template_date(directory.provenance(base / backend.run))
    return None


def check_same_prompts(data: RunData, provenance: Mapping[str, Any], whose: str, only: str | None = None) -> None:
    """Raise UnreadableInput if the prompts differ from those of an earlier run, though its rows may be the same.

    `whose` completes "the rendered prompts are not those that …"; `only` restricts the check to one part.
    """
    before = provenance.get("prompts")
    if not before:
        return
    recorded = before["sha256"]
    now = data.prompt_fingerprints(before["rows"])
    changed = [name for name, digest in now.items() if only in (None, name) and recorded.get(name, digest) != digest]
    if changed:
        raise UnreadableInput(
            f"the rendered prompts are not those that {whose}: {listed(changed)}",
            hint="the rows may be the same: bring back the tokenizer and its chat template as they were",
        )
