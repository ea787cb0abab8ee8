"""Reference figures of the losses: value and gradient of each case of tests/parity/cases.yaml, from the formulas alone.

Plain Python numbers, loops over tokens and over the vocabulary; nothing of sdkit, torch or numpy.  Gradients are by
complex step, Im f(z + ih) / h with h = 1e-30, which is exact to rounding.  `python tools/parity_figures.py` writes
tests/parity/figures.json.
"""

from __future__ import annotations

import cmath
import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from parity_batch import Batch, advantages, average, correction, counted, ratio, surrogate, token_weights
from parity_losses import Number, distillation, held, keys, kl

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "parity"
STEP = 1e-30


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name: `batch`, a method page's `losses` (and `route`, `temperature`), perhaps `golden`."""
    written = yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))
    found = dict(written["cases"])
    for product in written["products"]:
        keys, choices = zip(*product["each"].items(), strict=True)
        for chosen in itertools.product(*choices):
            name = f"{product['kind']}: " + ", ".join(map(_label, chosen))
            term = {"kind": product["kind"], **dict(zip(keys, chosen, strict=True))}
            found[name] = {"batch": product["batch"], "losses": {"term": term}}
    for case in found.values():
        case["rollouts"] = written["batches"][case["batch"]]
        case["losses"] = case.get("losses") or {"term": case["term"]}
    return found


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else " ".join(map(str, choice.values()))


def objective(case: Mapping[str, Any], batch: Batch) -> Number:
    """Σ over terms of coefficient × Σ over tokens of factor × weight × correction × loss."""
    route, total = case.get("route"), 0j
    rows = {n: counted(n, t, batch, route) for n, t in case["losses"].items()}
    joint = sum(
        len(places)
        for name, term in case["losses"].items()
        if keys(term.get("average")).get("denominator") == "joint"
        for places in rows[name]
    )
    for name, term in case["losses"].items():
        factors = average(term.get("average", ""), batch, rows[name], joint)
        weights = token_weights(term, batch, rows[name])
        losses = token_losses(term, batch, rows[name])
        total += term.get("coefficient", 1.0) * sum(
            factors[i][p] * weights[i][p] * correction(term, batch, i, rows[name][i], p) * loss
            for i, p, loss in losses
        )
    return total


def token_losses(term: Any, batch: Batch, rows: list[list[int]]) -> Iterator[tuple[int, int, Number]]:
    """Rollout, position and loss of each counted token."""
    worth = advantages(term["advantage"], batch, rows) if "advantage" in term else []
    for i, p in ((i, p) for i, places in enumerate(rows) for p in places):
        y = batch.token(i, p)
        match term["kind"]:
            case "distillation":
                sides = [batch.side(x, i, p, term.get("temperature")) for x in ("student", "teacher")]
                yield i, p, distillation(term, sides[0], sides[1], y)
            case "cross_entropy":
                yield i, p, -cmath.log(batch.side("student", i, p, 1.0)[y])
            case "policy_gradient":
                moved = ratio(term, batch, i, rows[i], p)
                yield i, p, surrogate(term.get("clip"), moved, worth[i][p])
            case "reference_kl":
                s, r = batch.side("student", i, p), batch.side("reference", i, p)
                whole = term["estimator"] == "vocabulary"
                yield i, p, kl(s, r) if whole else (cmath.log(s[y]) - cmath.log(r[y])) ** 2 / 2


def figures(case: Mapping[str, Any]) -> dict[str, Any]:
    """Value, and gradient in the student's logits: per rollout, position and id of the vocabulary."""
    batch = Batch(case["rollouts"], case.get("temperature", 1.0))
    gradient = copy.deepcopy([r["student"] for r in case["rollouts"]])
    for i, logits in enumerate(batch.students):
        for p, v in ((p, v) for p, row in enumerate(logits) for v in range(len(row))):
            logits[p][v] += STEP * 1j
            gradient[i][p][v] = objective(case, batch).imag / STEP
            logits[p][v] -= STEP * 1j
    return {"value": held(objective(case, batch)), "gradient": gradient}


def rounded(x: Any) -> Any:
    """Twelve digits behind the point, at every depth."""
    if isinstance(x, dict):
        return {name: rounded(part) for name, part in x.items()}
    return [rounded(part) for part in x] if isinstance(x, list) else round(x, 12) + 0.0


def main() -> None:
    """Write the figures."""
    found = {name: json.dumps(rounded(figures(case))) for name, case in cases().items()}
    lines = ",\n".join(f"{json.dumps(name)}: {text}" for name, text in found.items())
    (FOLDER / "figures.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
