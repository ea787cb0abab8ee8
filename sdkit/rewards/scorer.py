"""What every reward gives, and how many completions are judged at once, each within its time."""

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
    """What a completion is worth; perhaps what the environment has to say about it."""

    reward: float
    feedback: str | None = None
    parts: Mapping[str, float] = field(factory=lambda: MappingProxyType({}))
    """Of a sum: what each part gave, before its weight."""


@frozen(eq=False)
class Scorer:
    """One reward, opened.  Called with a completion and its row, or given many at once."""

    score_all: Callable[[Sequence[Pair]], list[ScoredCompletion]]
    check_row: Callable[[Row], object] = field(default=lambda row: None, kw_only=True)
    """Raises BadData where the reward could judge no completion of this row."""

    def __call__(self, completion: str, row: Row) -> ScoredCompletion:
        return self.score_all([(completion, row)])[0]


def score_each(
    worth: Callable[[str, Row], float], check: Callable[[Row], object] = lambda row: None
) -> Scorer:
    """A scorer that only compares: in this thread, without feedback."""
    return Scorer(
        lambda pairs: [ScoredCompletion(reward=worth(text, row)) for text, row in pairs],
        check_row=check,
    )


class DeadlineExceeded(Exception):
    """A completion was not judged within its time; `place` says which."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def score_in_threads(
    judge: Callable[[str, Row], ScoredCompletion],
    pairs: Sequence[Pair],
    *,
    threads: int,
    seconds: float | None,
) -> list[ScoredCompletion]:
    """Judge the pairs, `threads` at a time.  Raises what `judge` raises, and Late after `seconds` over one pair.

    A thread cannot be ended from outside: a late one is left alone, and as a daemon it does not keep the process
    from ending.
    """
    places = iter(range(len(pairs)))
    lock, stopped = threading.Lock(), threading.Event()
    started: dict[int, float] = {}
    done: queue.SimpleQueue[tuple[int, ScoredCompletion | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                place = next(places, None)
                if place is None:
                    return
                started[place] = time.monotonic()
            try:
                done.put((place, judge(*pairs[place])))
            except BaseException as error:  # handed over to the caller's thread
                done.put((place, error))

    for _ in range(min(threads, len(pairs))):
        threading.Thread(target=work, daemon=True, name="sdkit reward").start()
    found: dict[int, ScoredCompletion] = {}
    try:
        while len(found) < len(pairs):
            place, outcome = _next_outcome(done, started, lock, seconds)
            if isinstance(outcome, BaseException):
                raise outcome
            found[place] = outcome
    finally:
        stopped.set()
    return [found[place] for place in range(len(pairs))]


def _next_outcome(
    done: queue.SimpleQueue[tuple[int, ScoredCompletion | BaseException]],
    started: dict[int, float],
    lock: threading.Lock,
    seconds: float | None,
) -> tuple[int, ScoredCompletion | BaseException]:
    """The next outcome.  Raises Late where none comes and a pair has had its time."""
    while True:
        with lock:
            oldest = min(started, key=started.__getitem__, default=None)
            since = time.monotonic() if oldest is None else started[oldest]
        left = None if seconds is None else since + seconds - time.monotonic()
        try:
            found = done.get(timeout=None if left is None else max(left, 0.0))
        except queue.Empty:
            if oldest is not None:
                raise DeadlineExceeded(oldest) from None
            continue
        with lock:
            del started[found[0]]
        return found
