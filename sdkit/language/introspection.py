"""What the spec classes say about themselves: keys, types, ranges, kinds."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

import attrs

from sdkit.language.specs import DEFAULT_KIND, Range


@attrs.frozen
class Key:
    """One key of a spec class, as YAML sees it."""

    name: str  # in YAML
    field: str  # in Python
    type: Any
    range: Range | None
    default: Any
    help: str
    each: Range | None = None  # of the texts and numbers in a list or table
    names: Range | None = None  # of a table

    @property
    def bounds(self) -> str:
        """What the key accepts beyond its type, in words; empty where that is all."""
        parts = [(self.range, ""), (self.each, "each "), (self.names, "names: ")]
        return "; ".join(f"{what}{range.text}" for range, what in parts if range)

    @property
    def required(self) -> bool:
        """Whether the user must write it."""
        return self.default is attrs.NOTHING


@cache
def keys_of(cls: type) -> dict[str, Key]:
    """The keys of a spec class in order; those of a kind before those it shares with other kinds."""
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
        )
    return keys


def is_spec(tp: Any) -> bool:
    """Whether this type is a class of the language."""
    return isinstance(tp, type) and attrs.has(tp)


def members(tp: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, itself."""
    union = isinstance(tp, types.UnionType) or typing.get_origin(tp) is typing.Union
    return typing.get_args(tp) if union else (tp,)


def kinds_of(options: Sequence[Any]) -> dict[str, type]:
    """kind → class, where the options are classes told apart by `kind`."""
    classes = [o for o in options if is_spec(o) and hasattr(o, "kind")]
    return {c.kind: c for c in classes} if len(classes) > 1 else {}


@cache
def default_kind(classes: frozenset[type]) -> type | None:
    """The class of a union whose `kind` may be left out."""
    known = {frozenset(members(union)): cls for union, cls in DEFAULT_KIND.items()}
    return known.get(classes)
