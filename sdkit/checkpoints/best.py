"""`output.keep_best`: the model of the best evaluation so far, in best/."""

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
    """Write the model to best/ where this evaluation is better than every one before; a tie stays with the earlier."""
    which = state.spec.output.keep_best
    if which is None:
        return
    key = f"eval/{which}"
    value = metrics[key]
    so_far = collectives.broadcast_object(_read_best(run.path / FOLDER / NOTE))
    better = so_far is None or (value > so_far if which == "score" else value < so_far)
    if not math.isfinite(value) or not better:
        return
    checkpoint.save_model(state, run.path / FOLDER)
    run.write_json(f"{FOLDER}/{NOTE}", {"step": state.step, key: value})


def _read_best(note: Path) -> float | None:
    """The best value yet."""
    if not note.is_file():
        return None
    kept = json.loads(note.read_text(encoding="utf-8"))
    return next(value for name, value in kept.items() if name.startswith("eval/"))
