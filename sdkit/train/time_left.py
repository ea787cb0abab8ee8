"""Estimates how long a run still takes, from the duration of its latest steps and evaluations."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from sdkit.language.specs import EvaluationSpec

LATEST_STEPS = 20
"""Steps whose mean duration is that of the steps to come."""
LINE_EVERY = 600.0
"""Seconds between two lines of a log that say how long the run still takes."""
SOON = 60.0
"""A run that ends within this many seconds gets no such line."""


class TimeLeft:
    """Counts down to the end of a run.

    The first step of an attempt is slow (it compiles, allocates, fills caches), so its duration counts only until there
    is another one.
    """

    def __init__(
        self,
        end: int,
        evaluation: EvaluationSpec | None,
        evaluation_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._end = end
        self._evaluation = evaluation
        self._evaluation_seconds = evaluation_seconds
        self._clock = clock
        self._latest: deque[float] = deque(maxlen=LATEST_STEPS)
        self._is_first = True
        self._step = 0
        self._at = 0.0  # when the latest step ended
        self._told_at: float | None = None

    def step(self, step: int, seconds: float) -> None:
        """Record a training step."""
        if len(self._latest) == 1 and self._is_first:
            self._latest.clear()
            self._is_first = False
        self._latest.append(seconds)
        self._step, self._at = step, self._clock()

    def evaluation(self, seconds: float) -> None:
        """Record an evaluation."""
        self._evaluation_seconds = seconds
        self._at = self._clock()

    def seconds(self) -> float | None:
        """Returns the seconds that steps and evaluations still take; None before the first step."""
        if not self._latest:
            return None
        steps = (self._end - self._step) * sum(self._latest) / len(self._latest)
        evaluations = self._evaluations_left() * self._evaluation_seconds
        return max(steps + evaluations - (self._clock() - self._at), 0.0)

    def due(self) -> float | None:
        """Returns `seconds` when a log needs a line about it: after the second step, then every `LINE_EVERY` seconds."""
        left, now = self.seconds(), self._clock()
        told_lately = self._told_at is not None and now - self._told_at < LINE_EVERY
        if self._is_first or left is None or left < SOON or told_lately:
            return None
        self._told_at = now
        return left

    def _evaluations_left(self) -> int:
        if self._evaluation is None or self._step == self._end:
            return 0
        every = self._evaluation.every
        between = (self._end - 1) // every - self._step // every if every else 0
        return between + 1
