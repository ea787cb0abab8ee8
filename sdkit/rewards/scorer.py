"""The interface of rewards, and scoring in threads with a time limit per completion."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from types import MappingProxyType

from attrs import field, frozen

from sdkit.batches import Row
from sdkit.processes import DaemonThreads

Pair = tuple[str, Row]
"""A completion, and the row of its prompt."""


@frozen(kw_only=True)
class ScoredCompletion:
    """A completion's reward, and the environment's feedback if there is any."""

    reward: float
    feedback: str | None = None
    parts: Mapping[str, float] = field(factory=lambda: MappingProxyType({}))
    """For a weighted sum: the reward of each part, before its weight."""


_SCORING = threading.RLock()
"""Of all scorers, because a user's functions may share state."""


class Scorer:
    """An opened reward.  Call it for one completion and its row, or `score_all` for many.

    `check_row` raises BadData if the reward cannot score completions of a row.
    """

    def __init__(
        self,
        score_all: Callable[[Sequence[Pair]], list[ScoredCompletion]],
        check_row: Callable[[Row], object] = lambda row: None,
    ) -> None:
        self._score_all = score_all
        self.check_row = check_row

    def score_all(self, pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        """Returns the score of each pair, in order.  Of several threads that call it, one scores at a time."""
        with _SCORING:
            return self._score_all(pairs)

    def __call__(self, completion: str, row: Row) -> ScoredCompletion:
        return self.score_all([(completion, row)])[0]


def score_each(score: Callable[[str, Row], float], check: Callable[[Row], object] = lambda row: None) -> Scorer:
    """Returns a scorer that calls `score` for each completion, in this thread and without feedback."""
    return Scorer(lambda pairs: [ScoredCompletion(reward=score(text, row)) for text, row in pairs], check_row=check)


class DeadlineExceeded(Exception):
    """A completion was not scored within its time; `index` says which."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def score_in_threads(
    score: Callable[[str, Row], ScoredCompletion], pairs: Sequence[Pair], *, threads: int, seconds: float | None = None
) -> list[ScoredCompletion]:
    """Scores the pairs, `threads` at a time.

    Raises what `score` raises, and DeadlineExceeded if a pair takes more than `seconds`; a late thread keeps running.
    """
    started: dict[int, float] = {}

    def score_one(index: int) -> ScoredCompletion:
        started[index] = time.monotonic()
        return score(*pairs[index])

    pool = DaemonThreads(min(threads, len(pairs)), "sdkit reward")
    futures = [pool.submit(functools.partial(score_one, index)) for index in range(len(pairs))]

    def running() -> list[int]:
        """The pairs being scored, oldest first."""
        return [index for index in started.copy() if not futures[index].done()]

    try:
        while not all(future.done() for future in futures):
            timeout = None
            if seconds is not None:
                oldest = min((started[index] for index in running()), default=time.monotonic())
                timeout = max(oldest + seconds - time.monotonic(), 0.0)
            wait(futures, timeout, FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()  # raises what the pair raised
            for index in running():
                if seconds is not None and time.monotonic() >= started[index] + seconds:
                    raise DeadlineExceeded(index)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        pool.end(0.0)
