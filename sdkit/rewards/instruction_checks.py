"""Checks whether a completion follows its row's instructions: format, length, keywords, letters, language.

A check is a pure function of the completion's text and its own arguments.  A row names its checks in a column, as a list
of maps: `[{check: words, at_most: 30}, {check: language, name: French}]`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdkit.batches import Row
from sdkit.language import specs
from sdkit.language.errors import BadData, did_you_mean, listed, shorten
from sdkit.rewards.answer_language import LANGUAGES, is_in_language
from sdkit.rewards.answers import WORD
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer

_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)]*(?:\s+|$)")
_CODE_FENCE = re.compile(r"^```[^\n]*\n(.*?)\n?```$", re.DOTALL)
_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)


def words(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of words is within the bounds."""
    return _within(len(WORD.findall(text)), at_least, at_most)


def sentences(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of sentences is within the bounds; text after the last full stop is a sentence too."""
    return _within(sum(bool(part.strip()) for part in _SENTENCE_END.split(text)), at_least, at_most)


def characters(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of characters is within the bounds."""
    return _within(len(text), at_least, at_most)


def lines(text: str, count: int) -> bool:
    """Whether the text has this many lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines()) == count


def paragraphs(text: str, count: int) -> bool:
    """Whether the text has this many paragraphs, between empty lines."""
    return sum(bool(part.strip()) for part in re.split(r"\n[ \t]*\n", text)) == count


def bullets(text: str, count: int) -> bool:
    """Whether the text has this many list items that begin with `-`, `*` or `•`."""
    return len(re.findall(r"^[ \t]*[-*•][ \t]+\S", text, re.MULTILINE)) == count


def numbered(text: str, count: int) -> bool:
    """Whether the text has a list numbered from 1 to `count`, and no item beyond."""
    items = re.findall(r"^[ \t]*(\d+)[.)][ \t]+\S", text, re.MULTILINE)
    return items == [str(i) for i in range(1, count + 1)]


def headings(text: str, count: int) -> bool:
    """Whether the text has this many headings of Markdown."""
    return len(re.findall(r"^#{1,6}[ \t]+\S", text, re.MULTILINE)) == count


def table(text: str, columns: int) -> bool:
    """Whether the text has a Markdown table with this many columns and at least one row."""
    rows = [line.strip() for line in text.splitlines()]
    rows = [row for row in rows if row.startswith("|") and row.endswith("|") and len(row) > 1]
    widths = {row.count("|") - 1 for row in rows}
    return len(rows) >= 3 and widths == {columns} and bool(re.fullmatch(r"[|:\- ]+", rows[1]))


def json_object(text: str, keys: Sequence[str]) -> bool:
    """Whether the text is one JSON object with just these keys, with or without a code block around it."""
    value = _json(text)
    return isinstance(value, dict) and value.keys() == set(keys)


def json_list(text: str, count: int) -> bool:
    """Whether the text is one JSON list of this length, with or without a code block around it."""
    value = _json(text)
    return isinstance(value, list) and len(value) == count


def starts_with(text: str, start: str) -> bool:
    """Whether the text begins with `start`, in any case."""
    return text.casefold().startswith(start.casefold())


def ends_with(text: str, end: str) -> bool:
    """Whether the text ends with `end`, in any case; a full stop or quotation marks may follow."""
    return any(part.casefold().endswith(end.casefold()) for part in (text, text.rstrip(" .!\"'”’*")))


def wrapped(text: str, left: str, right: str) -> bool:
    """Whether the whole text stands between `left` and `right`."""
    inner = text.removeprefix(left).removesuffix(right).strip()
    return len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and bool(inner)


def marked(text: str, left: str, right: str, at_least: int = 1) -> bool:
    """Whether at least so many parts of the text stand between `left` and `right`, such as a title in `<<…>>`."""
    pattern = rf"{re.escape(left)}[^\n]*?[^\s{re.escape(left + right)}][^\n]*?{re.escape(right)}"
    return len(re.findall(pattern, text)) >= at_least


def upper_case(text: str) -> bool:
    """Whether the text has letters and all of them are capital."""
    return text.isupper()


def lower_case(text: str) -> bool:
    """Whether the text has letters and none of them is capital."""
    return text.islower()


def contains(text: str, words: Sequence[str]) -> bool:
    """Whether each of these words or phrases occurs, in any case."""
    return all(_occurrences(text, word) for word in words)


def excludes(text: str, words: Sequence[str]) -> bool:
    """Whether the text has at least one word, and none of these words or phrases, in any case."""
    return bool(WORD.search(text)) and not any(_occurrences(text, word) for word in words)


def occurs(text: str, word: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of times that a word occurs, in any case, is within the bounds."""
    return bool(WORD.search(text)) and _within(_occurrences(text, word), at_least, at_most)


def letter(text: str, letter: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of times that a letter or sign occurs, in any case, is within the bounds."""
    return bool(WORD.search(text)) and _within(text.casefold().count(letter.casefold()), at_least, at_most)


def initials(text: str, letter: str) -> bool:
    """Whether every word begins with this letter, in any case."""
    found = WORD.findall(text)
    return bool(found) and all(word.casefold().startswith(letter.casefold()) for word in found)


def one_of(text: str, options: Sequence[str]) -> bool:
    """Whether the text is one of these, apart from case and a full stop."""
    return text.rstrip(".").strip().casefold() in {option.casefold() for option in options}


def repeats(text: str, sentence: str) -> bool:
    """Whether the text is this sentence and nothing else, apart from white space."""
    return " ".join(text.split()) == " ".join(sentence.split())


def digits(text: str, allowed: bool) -> bool:
    """Whether the text has a digit (`allowed`), or words but no digit (not `allowed`)."""
    has_digit = any(c.isdigit() for c in text)
    return has_digit if allowed else bool(WORD.search(text)) and not has_digit


def language(text: str, name: str) -> bool:
    """Whether most of the text is in this language, one of `answer_language.LANGUAGES`."""
    return is_in_language(text, name)


CHECKS: Mapping[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        *(words, sentences, characters, lines, paragraphs, bullets, numbered, headings, table, json_object, json_list),
        *(
            starts_with,
            ends_with,
            wrapped,
            marked,
            upper_case,
            lower_case,
            contains,
            excludes,
            occurs,
            letter,
            initials,
        ),
        *(one_of, repeats, digits, language),
    )
}
"""Every check by its name in the data."""


def instruction_checks(reward: specs.InstructionChecks) -> Scorer:
    """Returns a scorer of a row's checks; the feedback names the checks that failed.

    A thinking model's text up to its last `</think>` is left out.  The scorer raises BadData if a row has no checks, or
    one that does not exist or does not take its arguments.
    """

    def score(pair: Pair) -> ScoredCompletion:
        completion, row = pair
        text = _THOUGHTS.sub("", completion).strip()
        checks = _checks_of(row, reward.checks)
        failed = [check for check in checks if not run_check(text, check)]
        share = 1 - len(failed) / len(checks)
        named = ", ".join(_spelled(check) for check in failed)
        return ScoredCompletion(
            reward=share if reward.credit == "share" else float(not failed),
            feedback=f"not followed: {named}" if failed else None,
        )

    return Scorer(lambda pairs: [score(pair) for pair in pairs], lambda row: _checks_of(row, reward.checks))


def run_check(text: str, check: Mapping[str, Any]) -> bool:
    """Runs one check of a row, `{check: NAME, ARGUMENT: VALUE, …}`, on a stripped text."""
    arguments = {name: value for name, value in check.items() if name != "check" and value is not None}
    return CHECKS[check["check"]](text, **arguments)


def _checks_of(row: Row, column: str) -> Sequence[Mapping[str, Any]]:
    """The row's checks.  Raises BadData, which names the row, for anything else."""
    checks = row.columns.get(column)
    if not isinstance(checks, Sequence) or isinstance(checks, str) or not checks:
        raise BadData(f"row {row.index} has no list of checks in the column '{column}'")
    for check in checks:
        if fault := _fault_of(check):
            raise BadData(f"row {row.index}: {fault}")
    return checks


def _fault_of(check: Any) -> str | None:
    """What is wrong with a check; None if it can be run."""
    name = check.get("check") if isinstance(check, Mapping) else None
    if not isinstance(name, str) or name not in CHECKS:
        hint = did_you_mean(str(name), list(CHECKS)) or f"they are {listed(list(CHECKS))}"
        return f"there is no check {shorten(name)}; {hint}"
    arguments = {key: value for key, value in check.items() if key != "check" and value is not None}
    if name == "language" and arguments.get("name") not in LANGUAGES:
        return f"the check language knows {listed(LANGUAGES)}, not {shorten(arguments.get('name'))}"
    try:
        inspect.signature(CHECKS[name]).bind("", **arguments)
        CHECKS[name]("text", **arguments)
    except TypeError as error:
        return f"the check {name} does not take these arguments: {error}"
    return None


def _spelled(check: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key} {shorten(value)}" for key, value in check.items() if key != "check")
    return f"{check['check']} ({arguments})" if arguments else str(check["check"])


def _within(number: int, at_least: int, at_most: int | None) -> bool:
    return at_least <= number and (at_most is None or number <= at_most)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()))


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    block = _CODE_FENCE.match(text)
    try:
        return json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return None
