"""Prompt templates: text with `{name}` or `{name.key}`; `{{` and `}}` are braces.

Not `str.format`: a template can neither reach attributes nor format, and what is inserted is never read again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from attrs import frozen

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


@frozen
class Field:
    """A place to fill: a name, and the keys that lead into a map from there."""

    name: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.path))


class TemplateError(ValueError):
    """A template that cannot be read; `offset` is the index of the character at fault."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


Template = tuple[str | Field, ...]


def parse(text: str) -> Template:
    """The template's pieces in order: plain text and fields."""
    parts: list[str | Field] = []
    for found in _PIECE.finditer(text):
        piece, name = found[0], found[1]
        if name is not None:
            if not _FIELD.fullmatch(name):
                raise TemplateError(f"{{{name}}} is not a slot's name in braces", found.start())
            head, *path = name.split(".")
            parts.append(Field(head, tuple(path)))
        elif piece in ("{", "}"):
            raise TemplateError(f"a single '{piece}'", found.start())
        else:
            plain = piece[0] if piece in ("{{", "}}") else piece
            if parts and isinstance(parts[-1], str):
                plain = str(parts.pop()) + plain
            parts.append(plain)
    return tuple(parts)


def fields(template: Template) -> Iterator[Field]:
    """The fields of a template, in order, repeats included."""
    return (part for part in template if isinstance(part, Field))


def fill(template: Template, lookup: Callable[[Field], str]) -> str:
    """The text, each field replaced once by what `lookup` returns."""
    return "".join(part if isinstance(part, str) else lookup(part) for part in template)
