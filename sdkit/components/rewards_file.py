"""A user's own function as a reward.  It must be quick, and return a finite number, perhaps with a text."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import numbers
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdkit.batches import Row
from sdkit.components.rewards_judged import Judged, Late, Pair, Scorer, in_threads
from sdkit.problems import BadData, Place, nearest, shorten
from sdkit.specs import FileReward


def user_function(reward: FileReward, base: Path) -> Scorer:
    """The function of a user's file, called in threads of its own.

    Raises BadData where it cannot be loaded; the scorer raises it where the function fails, takes longer than the
    reward allows or returns something else.
    """
    path = (base / reward.file).resolve()
    function = _load(path, reward)

    def judge(completion: str, row: Row) -> Judged:
        try:
            value = function(completion, dict(row.columns))
        except (Exception, SystemExit) as error:
            raise _failure(
                f"{reward.function} failed on {_sample(completion, row)}", path, reward, error
            ) from error
        return _read(value, reward, completion, row)

    def many(pairs: Sequence[Pair]) -> list[Judged]:
        try:
            return in_threads(judge, pairs, threads=reward.at_once, seconds=reward.seconds)
        except Late as late:
            raise BadData(
                f"{reward.function} in {reward.file} took more than {reward.seconds:g} s "
                f"on {_sample(*pairs[late.place])}",
                hint="make it quicker, or raise the reward's seconds",
            ) from None

    return Scorer(many)


def _sample(completion: str, row: Row) -> str:
    return f"row {row.index}, completion {shorten(completion)}"


def _read(value: Any, reward: FileReward, completion: str, row: Row) -> Judged:
    """A number, or a number and a text (or None)."""
    worth, text = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(worth, numbers.Real) and (text is None or isinstance(text, str)):
        with contextlib.suppress(OverflowError):
            number = float(worth)
            if math.isfinite(number):
                return Judged(reward=number, feedback=text or None)
    raise BadData(
        f"{reward.function} in {reward.file} returned {reprlib.repr(value)} for "
        f"{_sample(completion, row)}; it must return a finite number, or such a number and a text"
    )


def _load(path: Path, reward: FileReward) -> Callable[[str, dict[str, Any]], Any]:
    """The function, from this file and no other; the file is run once."""
    if not path.is_file():
        raise BadData(f"there is no file {reward.file}")
    name = f"sdkit reward {path}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadData(f"{reward.file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failure(f"{reward.file} cannot be loaded", path, reward, error) from error
    function = getattr(module, reward.function, None)
    if not callable(function):
        like = nearest(reward.function, [n for n, v in vars(module).items() if callable(v)])
        raise BadData(
            f"{reward.file} has no function '{reward.function}'",
            hint=f"did you mean '{like}'?" if like else None,
        )
    return function


def _failure(what: str, path: Path, reward: FileReward, error: BaseException) -> BadData:
    """An error of the user's code, with the last line of it that was reached."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path) and frame.lineno
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    place = Place(reward.file, lines[-1], 1) if lines else None
    return BadData(f"{what}: {type(error).__name__}: {error}", place=place)
