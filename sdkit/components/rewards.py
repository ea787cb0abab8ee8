"""Rewards: a completion as text, and its row, to a number.  Knows nothing of tokens, groups or advantages."""

from __future__ import annotations

import decimal
import importlib.util
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, assert_never

from sdkit.batches import Row
from sdkit.problems import BadData, BadEnvironment, Place, nearest, shorten
from sdkit.specs import (
    ChoiceReward,
    ExactReward,
    Extract,
    FileReward,
    LastChoice,
    LastNumber,
    NumberReward,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Reward,
    Tagged,
    WholeText,
)

Scorer = Callable[[str, Row], float]

# A sign belongs to the number only where nothing stands right before it: 10-20 ends in 20, not in -20.
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+−])?(?<![\w.])(?:{_UNSIGNED})(?:[eE][-+]?[0-9]+)?")
# The pronoun in "I think" is not a choice.
_CHOICE = re.compile(r"(?<![\w'’])(?!I [a-z])[A-Z](?![\w'’])")
# Exact to 60 digits, and never an exception, whatever exponent a model writes.
_EXACT = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


def open_reward(reward: Reward, base: Path, source: ReasoningGymSource | None) -> Scorer:
    """The function that scores a completion; a completion without an answer scores 0.

    `base` is the folder that relative paths start from; `source` is where the rows come from, if reasoning-gym.
    Raises BadData where the reward cannot be opened; the function raises it where a row lacks the right answer, or
    a user's function fails or returns no finite number.
    """
    match reward:
        case ReasoningGymReward():
            return _reasoning_gym(reward, source)
        case ExactReward():
            return _exact(reward)
        case NumberReward():
            return _number(reward)
        case ChoiceReward():
            return _choice(reward)
        case RegexReward():
            return _regex(reward)
        case FileReward():
            return _from_file(reward, base)
        case _:
            assert_never(reward)


def score(
    rewards: Mapping[str, Scorer], completions: Sequence[str], rows: Sequence[Row]
) -> dict[str, list[float]]:
    """Every reward of every completion; `rows` go with the completions.  Raises BadData as the rewards do."""
    pairs = list(zip(completions, rows, strict=True))
    return {name: [scorer(text, row) for text, row in pairs] for name, scorer in rewards.items()}


# ── which part of a completion is the answer ──────────────────────────────────────────────────


def extract(how: Extract, completion: str) -> str | None:
    """The answer in a completion; None where there is none."""
    match how:
        case WholeText():
            return completion.strip()
        case Tagged():
            _, opened, rest = completion.rpartition(f"<{how.tag}>")
            answer, closed, _ = rest.partition(f"</{how.tag}>")
            return answer.strip() if opened and closed else None
        case LastNumber():
            return _last(_NUMBER, completion)
        case LastChoice():
            return _last(_CHOICE, completion)
        case _:
            assert_never(how)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


# ── comparisons ───────────────────────────────────────────────────────────────────────────────


def _answer(row: Row, column: str) -> Any:
    value = row.columns.get(column)
    if value is None:
        raise BadData(f"row {row.index} has no right answer in the column '{column}'")
    return value


def _exact(reward: ExactReward) -> Scorer:
    def scored(completion: str, row: Row) -> float:
        right = str(_answer(row, reward.answer)).strip()
        answer = extract(reward.extract, completion)
        if answer is not None and reward.ignore_case:
            right, answer = right.casefold(), answer.casefold()
        return float(answer == right)

    return scored


def _number(reward: NumberReward) -> Scorer:
    tolerance = Decimal(repr(reward.tolerance))

    def scored(completion: str, row: Row) -> float:
        right = _read_number(str(_answer(row, reward.answer)))
        if right is None:
            raise BadData(
                f"row {row.index}: {shorten(row.columns[reward.answer])} in the column '{reward.answer}' "
                "is not a number"
            )
        answer = _read_number(extract(reward.extract, completion) or "")
        if answer is None:
            return 0.0
        apart = _EXACT.abs(_EXACT.subtract(answer, right))
        return float(apart.is_finite() and apart <= tolerance)

    return scored


def _read_number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    value = _EXACT.create_decimal(found[0].replace(",", "").replace("−", "-"))
    return value if value.is_finite() else None


def _choice(reward: ChoiceReward) -> Scorer:
    def scored(completion: str, row: Row) -> float:
        right = _letter(str(_answer(row, reward.answer)))
        if not re.fullmatch("[A-Z]", right):
            raise BadData(
                f"row {row.index}: {shorten(row.columns[reward.answer])} in the column '{reward.answer}' "
                "is not a capital letter"
            )
        return float(_letter(extract(reward.extract, completion) or "") == right)

    return scored


def _letter(text: str) -> str:
    """A choice without what is written around it: (B), B., **B**."""
    return text.strip(" \t\n()[].:*")


def _regex(reward: RegexReward) -> Scorer:
    try:
        pattern = re.compile(reward.pattern)
    except re.error as error:
        raise BadData(f"the pattern {shorten(reward.pattern)} cannot be read: {error}") from error
    return lambda completion, row: float(pattern.search(completion.strip()) is not None)


# ── scorers of others ─────────────────────────────────────────────────────────────────────────


def _reasoning_gym(reward: ReasoningGymReward, source: ReasoningGymSource | None) -> Scorer:
    if source is None:
        raise BadData("a reward of kind reasoning_gym needs data of kind reasoning_gym")
    try:
        import reasoning_gym
    except ImportError as error:
        raise BadEnvironment(
            "rewards of kind reasoning_gym need a package that is missing: "
            f"{error.name or 'reasoning_gym'}",
            hint="pip install reasoning-gym",
        ) from error
    task = reasoning_gym.create_dataset(
        source.task, size=source.size, seed=source.seed, **source.options
    )

    def scored(completion: str, row: Row) -> float:
        answer = extract(reward.extract, completion)
        if answer is None:
            return 0.0
        value = _task_score(task, answer, row)
        return float(value >= 1.0) if reward.full_marks_only else value

    return scored


def _task_score(task: Any, answer: str, row: Row) -> float:
    """The task's score.  An answer on which a scorer breaks is wrong, unless it breaks on the right answer too."""
    try:
        return float(task.score_answer(answer, row.raw))
    except Exception as error:
        try:
            task.score_answer(str(row.raw.get("answer")), row.raw)
        except Exception:
            raise BadData(f"row {row.index} cannot be scored by its task: {error!r}") from error
        return 0.0


def _from_file(reward: FileReward, base: Path) -> Scorer:
    path = (base / reward.file).resolve()
    function = _load(path, reward)

    def scored(completion: str, row: Row) -> float:
        try:
            value = function(completion, dict(row.columns))
        except Exception as error:
            sample = f"row {row.index}, completion {shorten(completion)}"
            raise _failure(f"{reward.function} failed on {sample}", path, reward, error) from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise BadData(
                f"{reward.function} in {reward.file} returned {value!r} for row {row.index}, "
                f"completion {shorten(completion)}; it must return a finite number"
            )
        return float(value)

    return scored


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


def _failure(what: str, path: Path, reward: FileReward, error: Exception) -> BadData:
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
