"""Introspection of the spec classes: their keys, types, ranges and kinds."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

import attrs

from sdkit.language.specs import DEFAULT_KIND, PathTo, Range, Table


@attrs.frozen
class Key:
    """One key of a spec class, as written in YAML."""

    name: str  # in YAML
    field: str  # in Python
    type: Any
    range: Range | None
    default: Any
    help: str
    each: Range | None = None  # range of the strings and numbers in a list or table
    names: Range | None = None  # range of a table's names
    path_to: PathTo | None = None  # what the value names if it is a path

    @property
    def bounds(self) -> str:
        """The restrictions beyond the type, in words; empty if there are none."""
        parts = [(self.range, ""), (self.each, "each "), (self.names, "names: ")]
        return "; ".join(f"{what}{range.text}" for range, what in parts if range)

    @property
    def required(self) -> bool:
        """Whether the key has no default."""
        return self.default is attrs.NOTHING


@cache
def keys_of(cls: type) -> dict[str, Key]:
    """Returns the keys of a spec class by their YAML name: a kind's own keys, then those it shares with other kinds."""
    hints = typing.get_type_hints(cls)
    keys = {}
    for a in sorted(attrs.fields(cls), key=lambda a: a.inherited and hasattr(cls, "kind")):
        name = a.metadata.get("key") or a.name
        meta = a.metadata
        keys[name] = Key(
            name,
            a.name,
            hints[a.name],
            meta.get("range"),
            a.default,
            meta.get("help", ""),
            meta.get("each"),
            meta.get("names"),
            meta.get("path_to"),
        )
    return keys


def is_spec(tp: Any) -> bool:
    """Whether a type is a spec class."""
    return isinstance(tp, type) and attrs.has(tp)


def members(tp: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself if it is no union."""
    union = isinstance(tp, types.UnionType) or typing.get_origin(tp) is typing.Union
    return typing.get_args(tp) if union else (tp,)


def options_of(tp: Any) -> list[Any]:
    """Returns the members of a union without None, or the type itself if it is no union."""
    return [member for member in members(tp) if member is not types.NoneType]


def entry_type(tp: Any) -> Any:
    """Returns the type of the entries of a list or table; raises StopIteration if the type is neither."""
    return next(typing.get_args(option)[0] for option in members(tp) if typing.get_origin(option) in (tuple, Table))


def kinds_of(options: Sequence[Any]) -> dict[str, type]:
    """Returns kind → class if the options are classes distinguished by `kind`, else an empty map."""
    classes = [o for o in options if is_spec(o) and hasattr(o, "kind")]
    return {c.kind: c for c in classes} if len(classes) > 1 else {}


@cache
def default_kind(classes: frozenset[type]) -> type | None:
    """Returns the class a union defaults to when `kind` is omitted, if it has one."""
    known = {frozenset(members(union)): cls for union, cls in DEFAULT_KIND.items()}
    return known.get(classes)


def is_inherited(key: Key, cls: Any) -> bool:
    """Whether a class has the key from a base class."""
    return getattr(attrs.fields(cls), key.field).inherited


def shared_keys(classes: Sequence[Any]) -> list[Key]:
    """Returns the keys that all kinds of a union have from a common base class."""
    inherited = [key for key in keys_of(classes[0]).values() if is_inherited(key, classes[0])]
    return [key for key in inherited if all(key in keys_of(cls).values() for cls in classes)]
