"""`output.keep_best`: keeps the model with the best evaluation so far in best/."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sdkit.checkpoints import checkpoint
from sdkit.distributed import collectives
from sdkit.models.weights import Weights
from sdkit.runs.directory import RunDirectory

FOLDER = "best"
NOTE = "best.json"


def keep_best(
    metric: tuple[str, Literal["higher", "lower"]],
    step: int,
    metrics: Mapping[str, float],
    student: Weights,
    tokenizer: Any,
    run: RunDirectory,
) -> None:
    """Write the model to best/ if the evaluation after `step` beats all earlier ones by `metric`.

    `metric` is a name and the values that are better.  On a tie the earlier model stays.
    """
    key, better_values = metric
    value = metrics[key]
    best = collectives.broadcast_object(_read_best(run.path / FOLDER / NOTE))
    better = best is None or (value > best if better_values == "higher" else value < best)
    if not math.isfinite(value) or not better:
        return
    checkpoint.save_model(student, tokenizer, run.path / FOLDER)
    run.write_json(f"{FOLDER}/{NOTE}", {"step": step, key: value})


def _read_best(note: Path) -> float | None:
    """The value recorded in best.json; None if there is none yet."""
    if not note.is_file():
        return None
    record = json.loads(note.read_text(encoding="utf-8"))
    return next(value for name, value in record.items() if name.startswith("eval/"))
