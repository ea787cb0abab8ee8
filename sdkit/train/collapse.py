"""Collapse: detects a mean over rollouts, or a score, that stays far below what the run had before.

It reads lines of metrics.jsonl and of warnings.jsonl only, so a resumed run gives the same warnings from its history.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Collection, Mapping, Sequence

from attrs import evolve

from sdkit.language.specs import CollapseSpec, ScoreCollapse, StepCollapse
from sdkit.train.tripwires import StepMetrics, TripwireWarning

SCORE_WIRE = "collapsed_score"
"""The name in warnings.jsonl of the tripwire for the score."""
SCORE_ADVICE = "end the run earlier or lower optimizer.lr; output.keep_best: score saves the best model"
_LENGTH_ADVICE = "look in samples/ for completions that end at once; a lower optimizer.lr may prevent it"
_ENTROPY_ADVICE = (
    "samples no longer differ: lower optimizer.lr, raise rollout.temperature, or add a term of kind reference_kl"
)
_STEP_WIRES: Mapping[str, tuple[str, str, str]] = {
    "length": ("rollout/completion_tokens", "the mean completion length is {:.4g} tokens", _LENGTH_ADVICE),
    "entropy": ("rollout/entropy", "the entropy at sampled tokens is {:.4g} nats", _ENTROPY_ADVICE),
}
"""By the key of `output.collapse`: the metric, what its value says, and where to look."""


class StepCollapseWatch:
    """Watches one metric over the training steps of a run in order.

    A step counts if the metric is below `share` times its median over the earlier steps that did not.
    """

    def __init__(self, name: str, spec: StepCollapse) -> None:
        self.name, self.spec = name, spec
        self._earlier: list[float] = []  # sorted
        self._counted: list[int] = []  # the latest steps in a row

    def add(self, line: StepMetrics) -> TripwireWarning | None:
        """Take in the next step; returns a warning when enough steps in a row count, and only once."""
        metric, text, advice = _STEP_WIRES[self.name]
        value = line.get(metric, math.nan)
        if not math.isfinite(value):
            return None
        median = self._earlier[len(self._earlier) // 2] if self._earlier else 0.0
        if value >= self.spec.share * median:
            insort(self._earlier, value)
            self._counted = []
            return None
        self._counted.append(int(line["step"]))
        if len(self._counted) != self.spec.steps:
            return None
        return TripwireWarning(
            wire=f"collapsed_{self.name}",
            first=self._counted[0],
            step=self._counted[-1],
            cause=f"{text.format(value)}, less than {self.spec.share:g} × its median of {median:.4g} before",
            look_at=advice,
            stops=self.spec.action == "stop",
        )


def step_watches(spec: CollapseSpec, lines: Sequence[StepMetrics]) -> list[StepCollapseWatch]:
    """The watches of the tripwires that are on, after the steps so far."""
    wires = {"length": spec.length, "entropy": spec.entropy}
    watches = [StepCollapseWatch(name, wire) for name, wire in wires.items() if wire is not None]
    for watch in watches:
        for line in lines:
            watch.add(line)
    return watches


class ScoreCollapseWatch:
    """Watches the headline score over the evaluations of a run in order.

    An evaluation counts if the score is below `share` times its best so far.
    """

    def __init__(self, spec: ScoreCollapse, scores: Mapping[int, float], warned: Collection[int]) -> None:
        """`scores` are those of the evaluations so far, by step; `warned` the steps at which this watch has warned."""
        self.spec = spec
        self._best = -math.inf
        self._counted: list[int] = []  # the latest evaluations in a row
        self._has_warned = False
        for step, score in scores.items():
            self._count(step, score)
            self._has_warned = bool(self._counted) and (self._has_warned or step in warned)

    @property
    def is_below(self) -> bool:
        """Whether the last evaluation counts."""
        return bool(self._counted)

    def add(self, step: int, score: float, fall: TripwireWarning | None) -> TripwireWarning | None:
        """Take in the next evaluation; returns a warning when enough in a row count, and only once.

        `fall` says how far the score has fallen from its best, None if that may be chance.
        """
        self._count(step, score)
        if not self._counted:
            self._has_warned = False
        if fall is None or self._has_warned or len(self._counted) < self.spec.evaluations:
            return None
        self._has_warned = True
        return evolve(fall, wire=SCORE_WIRE, first=self._counted[0], stops=self.spec.action == "stop")

    def _count(self, step: int, score: float) -> None:
        self._counted = [*self._counted, step] if score < self.spec.share * self._best else []
        self._best = max(self._best, score)
