"""What a key takes and what its default is, in words: for docs/language.md and `sdkit explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

from sdkit.language import specs
from sdkit.language.introspection import Key, is_spec, keys_of, members, options_of
from sdkit.language.resolved import without_defaults
from sdkit.language.scalars import compact
from sdkit.language.specs import LARGEST, Range, Schedule, Table

Link = Callable[[str, "type | Sequence[type]"], str]
"""Returns a text that leads from a label to a class, or to a choice between classes."""
PLURALS = {"number": "numbers", "table of anything": "tables"}
LONGEST_LIST = 4
"""The most kinds that are named; in place of more stands their number."""


def default(key: Key) -> str:
    """Returns the default of a key that is not required: `none`, or YAML in backticks."""
    return "none" if key.default is None else f"`{compact(without_defaults(key.default, key.type), flow=True)}`"


def takes(key: Key, link: Link) -> str:
    """Returns the type and range of a key's values, in the reader's words."""
    options = options_of(key.type)
    schedule = Schedule in options
    bounds = [_bounds(range) for range in (key.range, key.each) if range]
    parts = [_type(float if schedule else key.type, link), *filter(None, bounds)]
    if schedule:
        parts.append(f"or a {link('schedule', Schedule)}")
    if key.default is not None and len(options) < len(members(key.type)):
        parts.append("or `null`")
    return ", ".join(parts)


def _type(tp: Any, link: Link) -> str:
    options = options_of(tp)
    if all(is_spec(option) and hasattr(option, "kind") for option in options):
        if len(options) <= LONGEST_LIST:
            return kinds(options, link)
        return f"one of {link(f'{len(options)} kinds', options)}"
    if len(options) > 1:
        return either([_type(option, link) for option in options if option is not int or float not in options])
    [option], origin, args = options, get_origin(options[0]), get_args(options[0])
    if origin is Literal:
        return either([f"`{arg}`" for arg in args])
    if origin in (tuple, Table):
        noun = "list" if origin is tuple else "table"
        entry = _type(args[0], link)
        if entry.startswith("one of"):
            return f"{noun}, each {entry}"
        count = f"{len(args)} " if origin is tuple and args[-1] is not ... else ""
        return f"{noun} of {count}{PLURALS.get(entry, entry)}"
    if is_spec(option):
        required = [f"{key.name}: …" for key in keys_of(option).values() if key.required]
        return link(f"`{{{', '.join(required) or '…'}}}`", option)
    return {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", Any: "anything"}[option]


def kinds(classes: Sequence[Any], link: Link) -> str:
    """Returns the names of kinds: `a`, `b` or `c`."""
    return either([link(f"`{cls.kind}`", cls) for cls in classes])


def either(words: list[str]) -> str:
    """Returns the words as a choice: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _bounds(range: Range) -> str:
    """A range in short, without limits that no useful value comes near."""
    if range is specs.NOT_EMPTY:
        return "at least one"
    low, high = range.ends or (-LARGEST, LARGEST)
    ends = [_end(low, ">") if low > -LARGEST else "", _end(high, "<") if high < LARGEST else ""]
    if all(end.startswith(("≥", "≤")) for end in ends):
        return f"{low:g} to {high:g}"
    return ", ".join(filter(None, ends))


def _end(limit: float, sign: str) -> str:
    """`< 1` for 0.999999, `≤ 1` for 1."""
    whole = round(limit)
    if 0 < abs(limit - whole) <= 0.001:
        return f"{sign} {whole}"
    return f"{'≥' if sign == '>' else '≤'} {limit:g}"
