"""The interface of rewards, and scoring in threads with a time limit per completion."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from attrs import field, frozen

from sdkit.batches import Row

Pair = tuple[str, Row]
"""A completion, and the row of its prompt."""


@frozen(kw_only=True)
class ScoredCompletion:
    """A completion's reward, and the environment's feedback if there is any."""

    reward: float
    feedback: str | None = None
    parts: Mapping[str, float] = field(factory=lambda: MappingProxyType({}))
    """For a weighted sum: the reward of each part, before its weight."""


class Scorer:
    """An opened reward.  Call it for one completion and its row, or `score_all` for many.

    `check_row` raises BadData if the reward cannot score completions of a row.
    """

    def __init__(
        self,
        score_all: Callable[[Sequence[Pair]], list[ScoredCompletion]],
        check_row: Callable[[Row], object] = lambda row: None,
    ) -> None:
        self.score_all = score_all
        self.check_row = check_row

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

    Raises what `score` raises, and DeadlineExceeded if a pair takes more than `seconds`.  A thread cannot be killed: a
    late one keeps running, but as a daemon it does not keep the process alive.
    """
    indices = iter(range(len(pairs)))
    lock, stopped = threading.Lock(), threading.Event()
    started: dict[int, float] = {}
    done: queue.SimpleQueue[tuple[int, ScoredCompletion | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                index = next(indices, None)
                if index is None:
                    return
                started[index] = time.monotonic()
            try:
                done.put((index, score(*pairs[index])))
            except BaseException as error:  # raised again in the caller's thread
                done.put((index, error))

    for _ in range(min(threads, len(pairs))):
        threading.Thread(target=work, daemon=True, name="sdkit reward").start()
    scored: dict[int, ScoredCompletion] = {}
    try:
        while len(scored) < len(pairs):
            index, outcome = _next_outcome(done, started, lock, seconds)
            if isinstance(outcome, BaseException):
                raise outcome
            scored[index] = outcome
    finally:
        stopped.set()
    return [scored[index] for index in range(len(pairs))]


def _next_outcome(
    done: queue.SimpleQueue[tuple[int, ScoredCompletion | BaseException]],
    started: dict[int, float],
    lock: threading.Lock,
    seconds: float | None,
) -> tuple[int, ScoredCompletion | BaseException]:
    """Returns the next outcome.  Raises DeadlineExceeded if a pair runs out of time first."""
    while True:
        with lock:
            oldest = min(started, key=started.__getitem__, default=None)
            since = time.monotonic() if oldest is None else started[oldest]
        left = None if seconds is None else since + seconds - time.monotonic()
        try:
            outcome = done.get(timeout=None if left is None else max(left, 0.0))
        except queue.Empty:
            if oldest is not None:
                raise DeadlineExceeded(oldest) from None
            continue
        with lock:
            del started[outcome[0]]
        return outcome
