"""A user-defined function as a reward.  It must return a finite number, optionally with a text, in time."""

from __future__ import annotations

import contextlib
import math
import numbers
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdkit.batches import Row
from sdkit.language.errors import shorten
from sdkit.language.specs import FileReward
from sdkit.language.user_functions import UserFunction
from sdkit.rewards.scorer import DeadlineExceeded, Pair, ScoredCompletion, Scorer, score_in_threads


def function_reward(reward: FileReward, base: Path) -> Scorer:
    """Returns a scorer that calls the function in threads.

    Raises BadData if the function cannot be loaded; the scorer raises it if the function fails, takes longer than the
    reward allows or returns anything else.
    """
    function = UserFunction(reward.file, reward.function, base)

    def score(completion: str, row: Row) -> ScoredCompletion:
        what = f" on {_describe(completion, row)}"
        return _read(function.call(completion, dict(row.columns), what=what), function, completion, row)

    def score_all(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        try:
            return score_in_threads(score, pairs, threads=reward.at_once, seconds=reward.seconds)
        except DeadlineExceeded as late:
            raise function.error(
                f"took more than {reward.seconds:g} s on {_describe(*pairs[late.index])}",
                hint="make it quicker, or raise the reward's seconds",
            ) from None

    return Scorer(score_all)


def _describe(completion: str, row: Row) -> str:
    return f"row {row.index}, completion {shorten(completion)}"


def _read(value: Any, function: UserFunction, completion: str, row: Row) -> ScoredCompletion:
    """Reads a number, or a pair of a number and a text (or None)."""
    number, text = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(number, numbers.Real) and (text is None or isinstance(text, str)):
        with contextlib.suppress(OverflowError):
            reward_value = float(number)
            if math.isfinite(reward_value):
                return ScoredCompletion(reward=reward_value, feedback=text or None)
    raise function.error(
        f"returned {reprlib.repr(value)} for {_describe(completion, row)}; it must return a finite number, or such a number "
        "and a text"
    )
