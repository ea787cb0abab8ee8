"""The CPU's figures, stored beside this file: `python -m tools.gpu_check first --write-figures`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

STORED = Path(__file__).with_name("figures.json")
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest median of the relative differences of gradient norms.  A median, since rounding may change a drawn token, which
changes all of a page's figures."""


def read() -> dict[str, dict[str, float]]:
    """Return the stored figures: check, case -> gradient norm of the first step."""
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def store(check: str, norms: Mapping[str, float]) -> None:
    """Replace the stored figures of one check."""
    STORED.write_text(json.dumps(read() | {check: dict(norms)}, indent=1, sort_keys=True) + "\n")


def compare(check: str, norms: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """Return the figures with their differences from the stored ones, and whether these are as small as rounding."""
    stored = read().get(check, {})
    differences = {name: abs(norm - stored[name]) / stored[name] for name, norm in norms.items() if name in stored}
    result: dict[str, Any] = {"norms": dict(norms), "compared": len(differences)}
    if differences:
        worst = sorted(differences, key=lambda name: -differences[name])[:3]
        result |= {"median_difference": median(differences.values()), "worst": {n: differences[n] for n in worst}}
        result["ok"] = result["median_difference"] <= BOUNDS[dtype]
    return result
