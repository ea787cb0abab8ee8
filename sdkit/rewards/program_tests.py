"""Reads the tests of a row, and compares a program's results with them.  Knows nothing of how programs are run."""

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
"""By the names that LiveCodeBench and similar data sets use."""


@frozen(kw_only=True)
class Test:
    """One test case: the input of a program and the expected result."""

    kind: Kind
    input: Any
    """Standard input; a list of arguments or a map of named ones; or the source of asserts."""
    expected: Any = None
    """The expected output; the expected return value; or nothing."""
    function: str = ""
    cpu_seconds: float | None = None
    """The time limit of the row, if it has one."""

    def passed(self, result: Any) -> bool:
        """Whether the result is the expected one; for asserts, whether they passed."""
        match self.kind:
            case "stdin":
                return _same_lines(result, self.expected)
            case "call":
                return _equal(result, self.expected)
            case "asserts":
                return bool(result)
            case _:
                assert_never(self.kind)


class _InvalidTests(Exception):
    """Says what is wrong with a row's tests."""


def read_tests(row: Row, column: str) -> list[Test]:
    """Returns the tests of a row.  Raises BadData if there are none or they are invalid.

    A text is Python source, or JSON of one of the following: a list of texts, each the source of one test; a list of
    maps with `input`, `output` and optionally `testtype` (or `type`) and `fn_name`; one map with the lists `inputs` and
    `outputs`, and optionally `testtype`, `fn_name` and `time_limit` for all of them.
    """
    try:
        tests = _read(right_answer(row, column))
        if not tests:
            raise _InvalidTests("there are none")
    except _InvalidTests as error:
        raise BadData(f"row {row.index}: tests in the column '{column}': {error}") from None
    return tests


def _read(value: Any) -> list[Test]:
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, Mapping):
        return _read_table(value)
    if isinstance(value, Sequence):
        return [_read_one(test, {}) for test in value]
    raise _InvalidTests(f"{shorten(value)} is neither text, list nor table")


def _read_text(text: str) -> list[Test]:
    """Reads JSON of a list or a map; any other text is source."""
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
        raise _InvalidTests("a table needs the lists inputs and outputs")
    if len(inputs) != len(outputs):
        raise _InvalidTests(f"there are {len(inputs)} inputs, but {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    return [_read_one({"input": given, "output": output}, table) for given, output in pairs]


def _read_one(test: Any, shared: Mapping[str, Any]) -> Test:
    """Reads one test; `shared` are the entries common to all tests of the row."""
    if isinstance(test, str):
        return Test(kind="asserts", input=test)
    if not isinstance(test, Mapping) or "input" not in test:
        raise _InvalidTests(f"{shorten(str(test))} is neither source nor a table with input and output")
    entries = {**shared, **test}
    function = entries.get("fn_name") or ""
    if not isinstance(function, str):
        raise _InvalidTests(f"fn_name {shorten(function)} is not text")
    name = entries.get("testtype") or entries.get("type") or ("functional" if function else "stdin")
    if name not in KINDS:
        raise _InvalidTests(f"testtype {shorten(name)} {outside(KINDS)}")
    kind, given, expected = KINDS[name], test["input"], test.get("output")
    if kind == "call":
        if not function:
            raise _InvalidTests("tests of a function need its name as fn_name")
        given, expected = (_parse_arguments(given), _parse_json(expected) if isinstance(expected, str) else expected)
    elif not isinstance(given, str) or (kind == "stdin" and not isinstance(expected, str)):
        raise _InvalidTests(f"the input and output of {name} tests must be text")
    return Test(
        kind=kind,
        input=given,
        expected=expected,
        function=function,
        cpu_seconds=_parse_time_limit(entries.get("time_limit")),
    )


def _parse_arguments(given: Any) -> Any:
    """Reads a list or map of arguments; a text has one JSON argument per line."""
    if isinstance(given, str):
        return [_parse_json(line) for line in given.split("\n") if line.strip()]
    if isinstance(given, Mapping | Sequence):
        return given
    raise _InvalidTests(f"the input {shorten(given)} is no list of arguments")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _InvalidTests(f"{shorten(text)} is not JSON") from None


def _parse_time_limit(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and value > 0):
        return value
    raise _InvalidTests(f"time_limit {shorten(value)} is no number above 0")


def _equal(got: Any, expected: Any) -> bool:
    """Compares JSON values; values nested too deeply to be compared are not equal."""
    try:
        return bool(got == expected)
    except RecursionError:
        return False


def _same_lines(got: str, expected: str) -> bool:
    """Compares lines without surrounding white space; numbers are compared by value."""
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
