"""All tripwires of one run: what they say of its steps and evaluations, and whether the run has diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.language.specs import OutputSpec
from sdkit.runs.directory import RunDirectory
from sdkit.runs.evaluations import EvaluationResult, Key, read_back
from sdkit.train.collapse import SCORE_ADVICE, SCORE_WIRE, ScoreCollapseWatch, step_watches
from sdkit.train.divergence import DivergenceWatch, fallen_score
from sdkit.train.tripwires import StepMetrics, TripwireWarning, triggered


class RunWatch:
    """Takes in the steps and evaluations of one run in order, and returns the warnings that they cause."""

    def __init__(self, output: OutputSpec, run: RunDirectory, history: Sequence[Mapping[str, Any]]) -> None:
        """`history` has the lines of metrics.jsonl, after which the run continues."""
        self.patience = output.tripwire_steps
        self._recent = [line for line in history if "time/step" in line]
        self._divergence = DivergenceWatch(self.patience, self._recent) if self.patience else None
        self._collapse = step_watches(output.collapse, self._recent) if self.patience else []
        scores = {line["step"]: line["eval/score"] for line in history if "eval/score" in line}
        self._evaluations = len(scores)
        self._best_step = max(scores, key=scores.__getitem__, default=0)
        at_best = run.records("evaluations", self._best_step) if scores else []
        self._best = read_back(at_best) if at_best else None
        warned = [w["step"] for w in run.warnings() if w["wire"] == SCORE_WIRE]
        wire = output.collapse.score if self.patience else None
        self._score = ScoreCollapseWatch(wire, scores, warned) if wire else None
        self._collapsed_score: str | None = None  # how far the score of the last evaluation is below its best
        self.stop: str | None = None  # why a tripwire ends the run

    def step(self, line: StepMetrics) -> list[TripwireWarning]:
        """The warnings that a training step causes."""
        if self.patience is None:
            return []
        self._recent = [*self._recent[-self.patience :], line]
        watches = [watch for watch in (self._divergence, *self._collapse) if watch]
        warnings = [warning for watch in watches if (warning := watch.add(line))]
        return self._heed([*triggered(self._recent, self.patience), *warnings])

    def evaluated(self, step: int, result: EvaluationResult, key: Key) -> list[TripwireWarning]:
        """The warnings that an evaluation after `step` causes: its headline score, `key`, has fallen by more than chance."""
        self._evaluations += 1
        best, score = self._best, result.interval(key).mean
        has_fallen = best is not None and score < best.interval(key).mean
        fall = self._fall(step, best, result, key) if best and has_fallen and self.patience else None
        collapsed = self._score.add(step, score, fall) if self._score else None
        self._collapsed_score = fall.cause if fall and self._score and self._score.is_below else None
        if not has_fallen:
            self._best, self._best_step = result, step
        return self._heed([warning for warning in (collapsed or fall,) if warning])

    def _fall(self, step: int, best: EvaluationResult, result: EvaluationResult, key: Key) -> TripwireWarning | None:
        cause = fallen_score(best, result, key, self._evaluations)
        if cause is None:
            return None
        return TripwireWarning(
            wire="fallen_score", first=self._best_step, step=step, cause=cause, look_at=SCORE_ADVICE
        )

    def _heed(self, warnings: list[TripwireWarning]) -> list[TripwireWarning]:
        """The warnings, after noting the first that ends the run."""
        self.stop = self.stop or next(
            (f"{trip}; stopped, --resume continues" for trip in warnings if trip.stops), None
        )
        return warnings

    def verdict(self) -> str | None:
        """How the run has diverged by now; None if it has not."""
        causes = self._divergence and self._divergence.verdict(), self._collapsed_score, self.stop
        return "; ".join(filter(None, causes)) or None
