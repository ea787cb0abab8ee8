"""Answers in completions, compared with a column or by the task's own scorer.  Knows nothing of tokens or groups."""

from __future__ import annotations

import decimal
import re
import textwrap
from decimal import Decimal
from typing import Any, assert_never

from sdkit.batches import Row
from sdkit.language.errors import BadData, BadEnvironment, shorten
from sdkit.language.row_text import is_missing, text_of
from sdkit.language.specs import (
    ChoiceReward,
    ExactReward,
    Extract,
    LastChoice,
    LastCodeBlock,
    LastNumber,
    NumberReward,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Tagged,
    WholeText,
)
from sdkit.rewards.scorer import Scorer, score_each

# A sign belongs to the number only where nothing stands right before it: 10-20 ends in 20, not in -20.
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+−])?(?<![\w.])(?:{_UNSIGNED})(?:[eE][-+]?[0-9]+)?")
# The pronoun in "I think" is not a choice.
_CHOICE = re.compile(r"(?<![\w'’])(?!I [a-z])[A-Z](?![\w'’])")
# A fence may be longer than three, to hold one; what opens a block is no end of the one before it.
_BLOCK = re.compile(r"^[ \t]*(`{3,})[^`\n]*\n(.*?)^[ \t]*\1`*[ \t]*$", re.MULTILINE | re.DOTALL)
# Exact to 60 digits, and never an exception, whatever exponent a model writes.
_EXACT = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


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
        case LastCodeBlock():
            blocks = _BLOCK.findall(completion)
            return textwrap.dedent(blocks[-1][1]) if blocks else None
        case _:
            assert_never(how)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


# ── comparisons ───────────────────────────────────────────────────────────────────────────────


def right_answer(row: Row, column: str) -> Any:
    """What the column has.  Raises BadData where it has nothing."""
    value = row.columns.get(column)
    if is_missing(value):
        raise BadData(f"row {row.index} has no right answer in the column '{column}'")
    return value


def right_text(row: Row, column: str) -> str:
    """The text of a right answer.  Raises BadData where the row has none."""
    right_answer(row, column)
    return row.text(column) or ""


def exact(reward: ExactReward) -> Scorer:
    """Compares text; the scorer raises BadData where a row lacks the right answer, as all of this room do."""

    def right_of(row: Row) -> str:
        return right_text(row, reward.answer).strip()

    def scored(completion: str, row: Row) -> float:
        right = right_of(row)
        answer = extract(reward.extract, completion)
        if answer is not None and reward.ignore_case:
            right, answer = right.casefold(), answer.casefold()
        return float(answer == right)

    return score_each(scored, right_of)


def number(reward: NumberReward) -> Scorer:
    """Compares numbers, exactly but for the tolerance."""
    tolerance = Decimal(repr(reward.tolerance))

    def right_of(row: Row) -> Decimal:
        right = _read_number(right_text(row, reward.answer))
        if right is None:
            raise BadData(
                f"row {row.index}: {shorten(row.columns[reward.answer])} in the column '{reward.answer}' "
                "is not a number"
            )
        return right

    def scored(completion: str, row: Row) -> float:
        right = right_of(row)
        answer = _read_number(extract(reward.extract, completion) or "")
        if answer is None:
            return 0.0
        apart = _EXACT.abs(_EXACT.subtract(answer, right))
        return float(apart.is_finite() and apart <= tolerance)

    return score_each(scored, right_of)


def _read_number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    value = _EXACT.create_decimal(found[0].replace(",", "").replace("−", "-"))
    return value if value.is_finite() else None


def choice(reward: ChoiceReward) -> Scorer:
    """Compares capital letters."""

    def right_of(row: Row) -> str:
        right = _letter(right_text(row, reward.answer))
        if not re.fullmatch("[A-Z]", right):
            raise BadData(
                f"row {row.index}: {shorten(row.columns[reward.answer])} in the column '{reward.answer}' "
                "is not a capital letter"
            )
        return right

    def scored(completion: str, row: Row) -> float:
        return float(_letter(extract(reward.extract, completion) or "") == right_of(row))

    return score_each(scored, right_of)


def _letter(text: str) -> str:
    """A choice without what is written around it: (B), B., **B**."""
    return text.strip(" \t\n()[].:*")


def regex(reward: RegexReward) -> Scorer:
    """Searches for a pattern.  Raises BadData where the pattern cannot be read."""
    try:
        pattern = re.compile(reward.pattern)
    except re.error as error:
        raise BadData(f"the pattern {shorten(reward.pattern)} cannot be read: {error}") from error
    return score_each(lambda completion, row: float(pattern.search(completion.strip()) is not None))


# ── the task's own scorer ─────────────────────────────────────────────────────────────────────


def task_scorer(reward: ReasoningGymReward, source: ReasoningGymSource | None) -> Scorer:
    """The scorer of a reasoning-gym task.  Raises BadData without a task, BadEnvironment without the package."""
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

    return score_each(scored)


def _task_score(task: Any, answer: str, row: Row) -> float:
    """The task's score.  An answer on which a scorer breaks is wrong, unless it breaks on the right answer too."""
    try:
        return float(task.score_answer(answer, row.raw))
    except Exception as error:
        try:
            task.score_answer(text_of(row.raw.get("answer")), row.raw)
        except Exception:
            raise BadData(f"row {row.index} cannot be scored by its task: {error!r}") from error
        return 0.0
