"""`output.keep_best`: keeps the model with the best evaluation so far in best/."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdkit.checkpoints import checkpoint
from sdkit.distributed import collectives
from sdkit.runs.directory import RunDirectory

if TYPE_CHECKING:
    from sdkit.train.state import TrainState

FOLDER = "best"
NOTE = "best.json"


def keep_best(state: TrainState, run: RunDirectory, metrics: Mapping[str, float]) -> None:
    """Write the model to best/ if this evaluation beats all earlier ones; on a tie the earlier model stays."""
    metric = state.spec.output.keep_best
    if metric is None:
        return
    key = f"eval/{metric}"
    value = metrics[key]
    best = collectives.broadcast_object(_read_best(run.path / FOLDER / NOTE))
    better = best is None or (value > best if metric == "score" else value < best)
    if not math.isfinite(value) or not better:
        return
    checkpoint.save_model(state, run.path / FOLDER)
    run.write_json(f"{FOLDER}/{NOTE}", {"step": state.step, key: value})


def _read_best(note: Path) -> float | None:
    """The value recorded in best.json; None if there is none yet."""
    if not note.is_file():
        return None
    record = json.loads(note.read_text(encoding="utf-8"))
    return next(value for name, value in record.items() if name.startswith("eval/"))
