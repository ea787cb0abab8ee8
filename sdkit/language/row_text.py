"""Converts values of data rows to the text of a prompt, a slot or a completion.

Python can print any value, but a model should not read `[{'role': …}]`, `b'…'`, `True` or `nan`.  So only four
kinds of values are converted: text, numbers, a single assistant message, which becomes its content, and the turns of a
logged chat, which become a transcript.  Anything else is refused.
"""

from __future__ import annotations

import datetime
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from sdkit.language.errors import shorten

MAX_DEPTH = 100
"""Nesting levels allowed in a row's value."""


class Fault(Exception):
    """A row cannot be used; the message says why."""


class Turns(tuple[Mapping[str, Any], ...]):
    """The messages of a logged chat from its first assistant's turn on: a completion of several turns."""

    __slots__ = ()

    @property
    def answers(self) -> int:
        """The number of the assistant's turns."""
        return sum(message["role"] == "assistant" for message in self)

    @property
    def transcript(self) -> str:
        """The messages as a person reads them, each after its role; of a single answer, its text."""
        if len(self) == 1 and not self[0].get("tool_calls"):
            return self[0]["content"]
        return "\n".join(f"[{message['role']}] {message_text(message)}" for message in self)


def message_text(message: Mapping[str, Any]) -> str:
    """A message's content and its tool calls, each `name({…})`."""
    calls = (call["function"] for call in message.get("tool_calls", ()))
    texts = (f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False, default=str)})" for call in calls)
    return "\n".join(filter(None, [message["content"], *texts]))


def text_of(value: Any) -> str | None:
    """Returns the text of a row's value, or None if the value is missing.  Raises Fault if it has no text form.

    Null and NaN count as missing.  An assistant message, alone or as the only item of a list, becomes its content.
    """
    if hasattr(value, "as_py"):  # a scalar of pyarrow
        value = value.as_py()
    if is_missing(value):
        return None
    if isinstance(value, str):
        return _checked_text(str(value))
    if isinstance(value, Turns):
        return _checked_text(value.transcript)
    if _is_boolean(value):
        raise Fault(f"{describe_value(value)}, which has no one spelling: write it as text")
    if isinstance(value, numbers.Number):
        return _number_text(value)
    if isinstance(value, Mapping):
        return _message_content(value)
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        return _message_content(value[0])
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        raise Fault("a list of maps, not text; of a chat, {last_turn: COLUMN} is the last answer")
    raise Fault(f"{describe_value(value)}, not text")


def lines_of(value: Any) -> str | None:
    """Like `text_of`, for a value inserted into a column's template: a list of strings is joined with newlines."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return _checked_text("\n".join(value))
    return text_of(value)


def content_text(content: Any) -> str:
    """Returns the text of a message's content: text, or a list of parts of type text, joined by newlines as vLLM does.

    Raises Fault for anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise Fault(f"{describe_value(content)}, not text")
    texts = []
    for part in content:
        entries = {key: value for key, value in part.items() if value is not None}
        if not isinstance(text := entries.get("text"), str) or entries != {"type": "text", "text": text}:
            raise Fault(f"a list with a part of type {shorten(entries.get('type'))}, not {{type: text, text: …}}")
        texts.append(text)
    return "\n".join(texts)


def is_missing(value: Any) -> bool:
    """Whether the value is null or NaN."""
    if isinstance(value, Decimal):
        return value.is_nan()
    return value is None or (isinstance(value, numbers.Real) and value != value)


def is_empty(value: Any) -> bool:
    """Whether the value is missing or only white space."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def check_value(value: Any, depth: int = 0) -> None:
    """Raises Fault if a text in the value is not valid Unicode, or if the value could not be read in full."""
    if isinstance(value, Fault):
        raise value
    if isinstance(value, str):
        _check_encodable(value)
    elif depth > MAX_DEPTH:
        raise Fault(f"nested more than {MAX_DEPTH} levels deep")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_value(key, depth + 1)
            check_value(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_value(item, depth + 1)


def describe_value(value: Any) -> str:
    """Describes a value in an error message: numbers and booleans literally, anything else by its type."""
    if _is_boolean(value):
        return shorten(bool(value))
    if value is None or isinstance(value, bool | int | float):
        return shorten(value)
    if isinstance(value, numbers.Number):
        return str(value)
    if isinstance(value, Turns):
        return f"a chat with {value.answers} of the assistant's turns"
    for kinds, words in _DESCRIPTIONS:
        if isinstance(value, kinds):
            return words
    return f"a value of type {type(value).__name__}"


_DESCRIPTIONS: Sequence[tuple[Any, str]] = (
    (str, "text"),
    ((list, tuple), "a list"),
    (Mapping, "a map"),
    ((bytes, bytearray, memoryview), "bytes"),
    ((datetime.date, datetime.time), "a date or time"),
    (datetime.timedelta, "a duration"),
)


def _is_boolean(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # Python's, or NumPy's under either name


def _number_text(value: Any) -> str:
    """A number as JSON writes it."""
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    if isinstance(value, numbers.Integral):
        try:
            return str(int(value))
        except ValueError:
            raise Fault("a number of too many digits, not text") from None
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return str(value)
    raise Fault(f"{describe_value(value)}, not a finite number")


def _message_content(message: Mapping[Any, Any]) -> str:
    """The content of an assistant message."""
    keys = {key for key, value in message.items() if value is not None}
    if keys != {"role", "content"}:
        raise Fault("a map, not text or an assistant message {role: assistant, content: …}")
    if message["role"] != "assistant":
        raise Fault(f"a message of the role {shorten(message['role'])}, not 'assistant'")
    try:
        return _checked_text(content_text(message["content"]))
    except Fault as fault:
        raise Fault(f"an assistant message that holds {fault}") from None


def _checked_text(text: str) -> str:
    if "\0" in text:
        raise Fault("text with a NUL character")
    _check_encodable(text)
    return text


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise Fault(f"text with half a character ({half!r}) at place {error.start + 1}, not Unicode") from None
