"""A cache of evaluations: what was measured, under the hash of everything that determines it.

Processes may share the folder: a file is written under a temporary name and renamed, and never changes afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit.language.files import read_json_object
from sdkit.runs.evaluations import EvaluationResult, read_back

Facts = Mapping[str, Any]
"""Everything that determines the scores, as JSON values."""


def read_scores(folder: Path, facts: Facts) -> EvaluationResult | None:
    """Returns the evaluation that was stored for these facts; None if there is none, or its file is damaged."""
    stored = read_json_object(_file(folder, facts))
    if stored is None or stored.get("facts") != json.loads(_text(facts)):
        return None
    try:
        return read_back(stored["records"], tokens=stored["tokens"])
    except (KeyError, TypeError, ValueError):
        return None


def store_scores(folder: Path, facts: Facts, result: EvaluationResult) -> None:
    """Stores an evaluation; a cache that cannot be written is left as it is."""
    content = {"facts": facts, "records": result.records, "tokens": result.tokens}
    file = _file(folder, facts)
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")  # another process may store the same scores
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _file(folder: Path, facts: Facts) -> Path:
    digest = hashlib.sha256(_text(facts).encode()).hexdigest()
    return folder / digest[:2] / f"{digest}.json"


def _text(facts: Facts) -> str:
    return json.dumps(facts, sort_keys=True)
