"""What can be read off a regular expression without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _constants, _parser  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
from typing import Any

REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)


def repeats_repeated(pattern: str) -> bool:
    """Whether a part that repeats without limit is inside another one.  False for a pattern that cannot be read."""
    try:
        return _nested(_parser.parse(pattern), inside=False)
    except (re.error, OverflowError, RecursionError):
        return False


def _nested(parsed: Any, *, inside: bool) -> bool:
    for operation, argument in parsed:
        if operation is _constants.POSSESSIVE_REPEAT or operation is _constants.ATOMIC_GROUP:
            continue  # it is never tried in another way
        unlimited = operation in REPEATS and argument[1] is _constants.MAXREPEAT
        if unlimited and inside:
            return True
        if any(_nested(part, inside=inside or unlimited) for part in _parts(argument)):
            return True
    return False


def _parts(argument: Any) -> Iterator[Any]:
    """The patterns inside the argument of an operation."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _parts(part)
