"""Rewards that compare an answer with a column, and those scored by the task itself.  Knows nothing of tokens or groups."""

from __future__ import annotations

import decimal
import re
import textwrap
from decimal import Decimal
from typing import Any, TypeVar, assert_never

from sdkit.batches import Row
from sdkit.language import specs
from sdkit.language.errors import BadData, shorten
from sdkit.language.files import needs_package
from sdkit.language.row_text import is_missing, text_of
from sdkit.rewards.scorer import Scorer, score_each

T = TypeVar("T")

# A sign belongs to the number only if nothing directly precedes it: 10-20 ends in 20, not in -20.
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+−])?(?<![\w.])(?:{_UNSIGNED})(?:[eE][-+]?[0-9]+)?")
# The pronoun in "I think" is not a choice.
_CHOICE = re.compile(r"(?<![\w'’])(?!I [a-z])[A-Z](?![\w'’])")
WORD = re.compile(r"\w+(?:['’-]\w+)*")
# A fence may be longer than three, to contain one of three; an opening fence does not close the previous block.
_BLOCK = re.compile(r"^[ \t]*(`{3,})[^`\n]*\n(.*?)^[ \t]*\1`*[ \t]*$", re.MULTILINE | re.DOTALL)
# 60 digits, and no exception whatever exponent a model writes.
_EXACT = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


def extract(how: specs.Extract, completion: str) -> str | None:
    """Returns the answer in a completion, or None if there is none."""
    match how:
        case specs.WholeText():
            return completion.strip()
        case specs.Tagged():
            _, opened, rest = completion.rpartition(f"<{how.tag}>")
            answer, closed, _ = rest.partition(f"</{how.tag}>")
            return answer.strip() if opened and closed else None
        case specs.LastNumber():
            return _last(_NUMBER, completion)
        case specs.LastChoice():
            return _last(_CHOICE, completion)
        case specs.LastCodeBlock():
            blocks = _BLOCK.findall(completion)
            return textwrap.dedent(blocks[-1][1]) if blocks else None
        case specs.LastWord():
            return _last(WORD, completion)
        case specs.LastMatch():
            matches = list(re.finditer(how.pattern, completion))
            return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) if matches else None
        case _:
            assert_never(how)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = pattern.findall(text)
    return matches[-1] if matches else None


def right_answer(row: Row, column: str) -> Any:
    """Returns the value of the column.  Raises BadData if the row has none."""
    value = row.columns.get(column)
    if is_missing(value):
        raise BadData(f"row {row.index} has no right answer in the column '{column}'")
    return value


def right_text(row: Row, column: str) -> str:
    """Returns the text of the right answer.  Raises BadData if the row has none."""
    right_answer(row, column)
    return row.text(column) or ""


def _checked(row: Row, column: str, right: T | None, what: str) -> T:
    """Returns the right answer.  Raises BadData if the column's text could not be read as `what`."""
    if right is None:
        raise BadData(f"row {row.index}: {shorten(row.columns[column])} in the column '{column}' is not {what}")
    return right


def right_number(row: Row, column: str) -> Decimal:
    """Returns the number that is the right answer.  Raises BadData if there is none."""
    return _checked(row, column, _read_number(right_text(row, column)), "a number")


def right_letter(row: Row, column: str) -> str:
    """Returns the capital letter that is the right answer.  Raises BadData if there is none."""
    return _checked(row, column, re.fullmatch("[A-Z]", _letter(right_text(row, column))), "a capital letter")[0]


def check_right_answer(reward: specs.Reward, row: Row) -> None:
    """Raises BadData if the reward compares text, a number or a letter, and the row has none to compare with."""
    match reward:
        case specs.ExactReward() | specs.MathVerifyReward():
            right_text(row, reward.answer)
        case specs.NumberReward():
            right_number(row, reward.answer)
        case specs.ChoiceReward():
            right_letter(row, reward.answer)
        case _:
            pass


def exact(reward: specs.ExactReward) -> Scorer:
    """Compares text.  Like all scorers of this module, raises BadData if a row lacks the right answer."""

    def right_answer_of(row: Row) -> str:
        return right_text(row, reward.answer).strip()

    def score(completion: str, row: Row) -> float:
        right = right_answer_of(row)
        answer = extract(reward.extract, completion)
        if answer is not None and reward.ignore_case:
            right, answer = right.casefold(), answer.casefold()
        return float(answer == right)

    return score_each(score, right_answer_of)


def number(reward: specs.NumberReward) -> Scorer:
    """Compares numbers, exactly up to the tolerance."""
    tolerance = Decimal(repr(reward.tolerance))

    def right_answer_of(row: Row) -> Decimal:
        return right_number(row, reward.answer)

    def score(completion: str, row: Row) -> float:
        right = right_answer_of(row)
        answer = _read_number(extract(reward.extract, completion) or "")
        if answer is None:
            return 0.0
        difference = _EXACT.abs(_EXACT.subtract(answer, right))
        return float(difference.is_finite() and difference <= tolerance)

    return score_each(score, right_answer_of)


def _read_number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    value = _EXACT.create_decimal(match[0].replace(",", "").replace("−", "-"))
    return value if value.is_finite() else None


def choice(reward: specs.ChoiceReward) -> Scorer:
    """Compares capital letters."""

    def right_answer_of(row: Row) -> str:
        return right_letter(row, reward.answer)

    def score(completion: str, row: Row) -> float:
        return float(_letter(extract(reward.extract, completion) or "") == right_answer_of(row))

    return score_each(score, right_answer_of)


def _letter(text: str) -> str:
    """A choice without the punctuation around it: (B), B., **B**."""
    return text.strip(" \t\n()[].:*")


def regex(reward: specs.RegexReward) -> Scorer:
    """Searches for a pattern.  Raises BadData if the pattern is invalid."""
    try:
        pattern = re.compile(reward.pattern)
    except re.error as error:
        raise BadData(f"the pattern {shorten(reward.pattern)} cannot be read: {error}") from error
    return score_each(lambda completion, row: float(pattern.search(completion.strip()) is not None))


def task_scorer(reward: specs.ReasoningGymReward, source: specs.ReasoningGymSource | None) -> Scorer:
    """Returns the scorer of a reasoning-gym task.  Raises BadData without a task, BadEnvironment without the package."""
    if source is None:
        raise BadData("a reward of kind reasoning_gym needs data of kind reasoning_gym")
    with needs_package("rewards of kind reasoning_gym", "reasoning-gym"):
        import reasoning_gym
    task = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.options)

    def score(completion: str, row: Row) -> float:
        answer = extract(reward.extract, completion)
        if answer is None:
            return 0.0
        value = _task_score(task, answer, row)
        return float(value >= 1.0) if reward.full_marks_only else value

    return score_each(score)


def _task_score(task: Any, answer: str, row: Row) -> float:
    """Returns the task's score.  An answer that makes the scorer fail is wrong, unless the right answer does too."""
    try:
        return float(task.score_answer(answer, row.raw))
    except Exception as error:
        try:
            task.score_answer(text_of(row.raw.get("answer")), row.raw)
        except Exception:
            raise BadData(f"row {row.index} cannot be scored by its task: {error!r}") from error
        return 0.0
