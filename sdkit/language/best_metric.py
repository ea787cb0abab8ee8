"""What `output.keep_best` can name, and which values of it are better."""

from __future__ import annotations

from typing import Literal

from sdkit.language.metric_names import MEASURES, attempts, pass_at
from sdkit.language.specs import ExperimentSpec

Better = Literal["higher", "lower"]
"""The values of a metric that are better."""


def best_metrics(spec: ExperimentSpec) -> dict[str, Better | None]:
    """The names that `output.keep_best` can have, each with the better values; None where that depends on the task."""
    names: dict[str, Better | None] = {}
    for suite_name, suite in spec.suites.items():
        if not names:
            names = {"score": "higher"}
            names |= {"loss": "lower"} if suite.loss_prompts else {}
        for decoding_name, decoding in suite.decoding.items():
            scores = [suite.score, *suite.also]
            if decoding.samples > 1 and suite.pass_score is not None:
                scores += [pass_at(k) for k in attempts(decoding.samples)]
            start = f"{suite_name}/{decoding_name}/"
            names |= {start + name: "higher" for name in scores}
            # Greedy decoding samples nothing, so it has no entropy.
            names |= {start + m: better for m, better in MEASURES.items() if m != "entropy" or decoding.temperature}
    return names


def best_metric(spec: ExperimentSpec) -> tuple[str, Better] | None:
    """The metric by which a run keeps its best model, and the better values; None if it keeps none."""
    name = spec.output.keep_best
    better = name and (spec.output.best_is or best_metrics(spec).get(name))
    return (f"eval/{name}", better) if name and better else None
