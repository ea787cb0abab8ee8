"""Tests of programs as rows have them, and what a program should have put out.  Knows nothing of how they are run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, assert_never

from attrs import frozen

from sdkit.batches import Row
from sdkit.language.errors import BadData, outside, shorten
from sdkit.rewards.answers import right_answer

Kind = Literal["stdin", "call", "asserts"]
KINDS: Mapping[str, Kind] = {"stdin": "stdin", "functional": "call", "code": "asserts"}
"""By the names that LiveCodeBench and the data sets after its model have for them."""


@frozen(kw_only=True)
class Test:
    """One case: what a program is given, and what must come of it."""

    kind: Kind
    input: Any
    """Standard input; a list of arguments, or a table of named ones; the source of asserts."""
    expected: Any = None
    """What must be printed; what must be returned; nothing."""
    function: str = ""
    cpu_seconds: float | None = None
    """The time that the row itself allows."""

    def passed(self, got: Any) -> bool:
        """Whether what came of it is what was expected; of asserts, whether they were passed."""
        match self.kind:
            case "stdin":
                return _same_lines(got, self.expected)
            case "call":
                return _equal(got, self.expected)
            case "asserts":
                return bool(got)
            case _:
                assert_never(self.kind)


class _Unreadable(Exception):
    """What is wrong with a row's tests."""


def read_tests(row: Row, column: str) -> list[Test]:
    """The tests of a row.  Raises BadData where there are none, or none that can be read.

    A text is Python source, or JSON for one of the following: a list of texts, each the source of one test; a list of
    tables with `input`, `output` and perhaps `testtype` (or `type`) and `fn_name`; one table with the lists `inputs`
    and `outputs`, and `testtype`, `fn_name` and perhaps `time_limit` for all of them.
    """
    try:
        found = _read(right_answer(row, column))
        if not found:
            raise _Unreadable("there are none")
    except _Unreadable as error:
        raise BadData(f"row {row.index}: tests in the column '{column}': {error}") from None
    return found


def _read(value: Any) -> list[Test]:
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, Mapping):
        return _read_table(value)
    if isinstance(value, Sequence):
        return [_read_one(each, {}) for each in value]
    raise _Unreadable(f"{shorten(value)} is neither text, list nor table")


def _read_text(text: str) -> list[Test]:
    """JSON of a list or a table, else source."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, list | dict):
            return _read(value)
    return [Test(kind="asserts", input=text)] if text.strip() else []


def _read_table(table: Mapping[str, Any]) -> list[Test]:
    inputs, outputs = table.get("inputs"), table.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence):
        raise _Unreadable("a table needs the lists inputs and outputs")
    if len(inputs) != len(outputs):
        raise _Unreadable(f"there are {len(inputs)} inputs, but {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    return [_read_one({"input": given, "output": output}, table) for given, output in pairs]


def _read_one(test: Any, shared: Mapping[str, Any]) -> Test:
    """One test; `shared` are the entries that all tests of the row have."""
    if isinstance(test, str):
        return Test(kind="asserts", input=test)
    if not isinstance(test, Mapping) or "input" not in test:
        raise _Unreadable(
            f"{shorten(str(test))} is neither source nor a table with input and output"
        )
    both = {**shared, **test}
    function = both.get("fn_name") or ""
    if not isinstance(function, str):
        raise _Unreadable(f"fn_name {shorten(function)} is not text")
    name = both.get("testtype") or both.get("type") or ("functional" if function else "stdin")
    if name not in KINDS:
        raise _Unreadable(f"testtype {shorten(name)} {outside(KINDS)}")
    kind, given, expected = KINDS[name], test["input"], test.get("output")
    if kind == "call":
        if not function:
            raise _Unreadable("tests of a function need its name as fn_name")
        given, expected = (
            _arguments(given),
            _json(expected) if isinstance(expected, str) else expected,
        )
    elif not isinstance(given, str) or (kind == "stdin" and not isinstance(expected, str)):
        raise _Unreadable(f"the input and output of {name} tests must be text")
    return Test(
        kind=kind,
        input=given,
        expected=expected,
        function=function,
        cpu_seconds=_time(both.get("time_limit")),
    )


def _arguments(given: Any) -> Any:
    """A text has one argument a line, as JSON."""
    if isinstance(given, str):
        return [_json(line) for line in given.split("\n") if line.strip()]
    if isinstance(given, Mapping | Sequence):
        return given
    raise _Unreadable(f"the input {shorten(given)} is no list of arguments")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _Unreadable(f"{shorten(text)} is not JSON") from None


def _time(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and value > 0):
        return value
    raise _Unreadable(f"time_limit {shorten(value)} is no number above 0")


def _equal(got: Any, expected: Any) -> bool:
    """Values as JSON has them; what is nested too deeply to be compared is wrong."""
    try:
        return bool(got == expected)
    except RecursionError:
        return False


# ── printed lines ─────────────────────────────────────────────────────────────────────────────


def _same_lines(got: str, expected: str) -> bool:
    """The same lines, white space around them aside; numbers by value."""
    ours, theirs = got.strip().splitlines(), expected.strip().splitlines()
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(got: str, expected: str) -> bool:
    if got.strip() == expected.strip():
        return True
    ours, theirs = got.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(got: str, expected: str) -> bool:
    if got == expected:
        return True
    try:
        return Decimal(got) == Decimal(expected)
    except InvalidOperation:
        return False
