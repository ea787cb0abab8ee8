"""Divergence: detects a loss, a gradient or a score that has left the run's own history.

It reads lines of metrics.jsonl and stored evaluations only, so a resumed run gives the same verdict from its history.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence

from sdkit.runs.evaluations import EvaluationResult, Key
from sdkit.runs.intervals import paired_difference
from sdkit.train.tripwires import StepMetrics, TripwireWarning

FAR = 20.0
"""A loss or gradient norm is far above its history if it exceeds this many times the median."""
SMALLEST_SCALE: Mapping[str, float] = {"loss": 1.0, "grad_norm": 50.0}
"""Medians below these count as these, since a loss or gradient that begins near 0 may grow by any factor."""
NAMES = {"loss": "the loss", "grad_norm": "the gradient norm"}
LOOK_AT = "lower optimizer.lr, lengthen its warm-up, or lower optimizer.max_grad_norm"


class DivergenceWatch:
    """Watches the training steps of one run in order; a step is far off if its loss or gradient norm is far above the
    median of the earlier steps that were not.
    """

    def __init__(self, patience: int, lines: Sequence[StepMetrics] = ()) -> None:
        """`patience` is the number of steps in a row that are far off before a warning; `lines` are the steps so far."""
        self.patience = patience
        self._medians: dict[str, list[float]] = {name: [] for name in SMALLEST_SCALE}  # sorted
        self._steps = 0
        self._far_off: list[tuple[int, str]] = []  # the latest steps in a row, with their causes
        for line in lines:
            self.add(line)

    def add(self, line: StepMetrics) -> TripwireWarning | None:
        """Take in the next step; returns a warning when the patience is used up, and only once."""
        self._steps += 1
        if cause := self._cause(line):
            self._far_off.append((int(line["step"]), cause))
        else:
            self._far_off = []
            for name, values in self._medians.items():
                if math.isfinite(line.get(name, math.nan)):
                    insort(values, abs(line[name]))
        return self._warning() if len(self._far_off) == self.patience else None

    def verdict(self) -> str | None:
        """How the run has diverged, if its last steps are far off: as many as the patience, or all after the first."""
        needed = min(self.patience, self._steps - 1)
        return str(self._warning()) if 0 < needed <= len(self._far_off) else None

    def _warning(self) -> TripwireWarning:
        (first, _), (last, cause) = self._far_off[0], self._far_off[-1]
        return TripwireWarning(wire="divergence", first=first, step=last, cause=cause, look_at=LOOK_AT)

    def _cause(self, line: StepMetrics) -> str | None:
        for name, values in self._medians.items():
            value = line.get(name)
            if value is None or not values:
                continue
            median = values[len(values) // 2]
            if not math.isfinite(value):
                return f"{NAMES[name]} is not finite; its median was {median:.4g} before"
            if value > FAR * max(median, SMALLEST_SCALE[name]):
                return f"{NAMES[name]} is {value:.4g}, far above its median of {median:.4g} before"
        return None


def fallen_score(best: EvaluationResult, last: EvaluationResult, key: Key, evaluations: int) -> str | None:
    """How far a score has fallen from its best of several evaluations; None if that may be chance.

    The interval is Bonferroni-corrected, since the best of many evaluations is partly luck.
    """
    change = paired_difference(best.scores[key], last.scores[key], level=1 - 0.05 / evaluations)
    if change.high >= 0:
        return None
    before, after = best.interval(key).mean, last.interval(key).mean
    return f"{' '.join(key)} fell from {before:.3f} at its best to {after:.3f}"
