"""Prompt templates: text with `{name}` or `{name.key}`; `{{` and `}}` are literal braces.

Unlike `str.format`, templates cannot access attributes or apply formats.  Inserted text is not parsed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


@frozen
class Field:
    """A placeholder: a name, and keys into nested maps below it."""

    name: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.path))


class TemplateError(ValueError):
    """A template cannot be parsed; `offset` is the index of the offending character."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


Template = tuple[str | Field, ...]


def parse(text: str) -> Template:
    """Returns the template's parts in order: text and fields.  Raises TemplateError."""
    parts: list[str | Field] = []
    for match in _TOKEN.finditer(text):
        token, name = match[0], match[1]
        if name is not None:
            if not _FIELD.fullmatch(name):
                raise TemplateError(f"{{{name}}} is not a slot's name in braces", match.start())
            head, *path = name.split(".")
            parts.append(Field(head, tuple(path)))
        elif token in ("{", "}"):
            raise TemplateError(f"a single '{token}'", match.start())
        else:
            plain = token[0] if token in ("{{", "}}") else token
            if parts and isinstance(parts[-1], str):
                plain = str(parts.pop()) + plain
            parts.append(plain)
    return tuple(parts)


def fields(template: Template) -> Iterator[Field]:
    """Yields the fields of a template in order, with repeats."""
    return (part for part in template if isinstance(part, Field))


def fill(template: Template, lookup: Callable[[Field], str]) -> str:
    """Returns the text with each field replaced by what `lookup` returns for it."""
    return "".join(part if isinstance(part, str) else lookup(part) for part in template)


def text_at(values: Mapping[str, Any], field: Field) -> str:
    """Returns the value of a field as text: a text as it is, anything else as JSON.  Raises ValueError if there is none."""
    value: Any = values
    for key in (field.name, *field.path):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            known = (
                f"only {', '.join(map(str, value))}" if isinstance(value, Mapping) else "and what it is in has no keys"
            )
            raise ValueError(f"there is no {{{field}}}, {known}") from None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
