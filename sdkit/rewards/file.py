"""A user's own function as a reward.  It must be quick, and return a finite number, perhaps with a text."""

from __future__ import annotations

import contextlib
import math
import numbers
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdkit.batches import Row
from sdkit.language.errors import BadData, shorten
from sdkit.language.specs import FileReward
from sdkit.language.user_functions import failure, load_function
from sdkit.rewards.scorer import DeadlineExceeded, Pair, ScoredCompletion, Scorer, score_in_threads


def function_reward(reward: FileReward, base: Path) -> Scorer:
    """The function of a user's file, called in threads of its own.

    Raises BadData where it cannot be loaded; the scorer raises it where the function fails, takes longer than the
    reward allows or returns something else.
    """
    path = (base / reward.file).resolve()
    function = load_function(path, reward.file, reward.function)

    def judge(completion: str, row: Row) -> ScoredCompletion:
        try:
            value = function(completion, dict(row.columns))
        except (Exception, SystemExit) as error:
            what = f"{reward.function} failed on {_sample(completion, row)}"
            raise failure(what, path, reward.file, error) from error
        return _read(value, reward, completion, row)

    def many(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        try:
            return score_in_threads(judge, pairs, threads=reward.at_once, seconds=reward.seconds)
        except DeadlineExceeded as late:
            raise BadData(
                f"{reward.function} in {reward.file} took more than {reward.seconds:g} s "
                f"on {_sample(*pairs[late.place])}",
                hint="make it quicker, or raise the reward's seconds",
            ) from None

    return Scorer(many)


def _sample(completion: str, row: Row) -> str:
    return f"row {row.index}, completion {shorten(completion)}"


def _read(value: Any, reward: FileReward, completion: str, row: Row) -> ScoredCompletion:
    """A number, or a number and a text (or None)."""
    worth, text = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(worth, numbers.Real) and (text is None or isinstance(text, str)):
        with contextlib.suppress(OverflowError):
            number = float(worth)
            if math.isfinite(number):
                return ScoredCompletion(reward=number, feedback=text or None)
    raise BadData(
        f"{reward.function} in {reward.file} returned {reprlib.repr(value)} for "
        f"{_sample(completion, row)}; it must return a finite number, or such a number and a text"
    )
