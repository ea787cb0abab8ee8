"""How a spec class is declared.  Pure data: no torch, no files, no derived values.

A class is a map in YAML; its fields are the keys.  A union of classes is told apart by `kind`; a member whose fields
all have defaults may be written as its bare kind (`divergence: forward_kl`).  Each field carries its help text and its
range, so that errors, `sdkit plan` and the surface test read them from one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import attrs
from attrs import NOTHING, frozen

T = TypeVar("T")


class Table(Mapping[str, T]):
    """An immutable, hashable map from names to specs, in the order written."""

    def __init__(self, items: Mapping[str, T] | None = None) -> None:
        self._items: dict[str, T] = dict(items or {})

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __repr__(self) -> str:
        return f"Table({self._items!r})"


@frozen
class Range:
    """The numbers a field accepts; `text` is what an error message says."""

    text: str
    accepts: Callable[[Any], bool]


POSITIVE = Range("a number above 0", lambda v: v > 0)
NOT_NEGATIVE = Range("a number of at least 0", lambda v: v >= 0)
AT_LEAST_ONE = Range("a whole number of at least 1", lambda v: v >= 1)
AT_LEAST_64 = Range("a whole number of at least 64", lambda v: v >= 64)
SHARE = Range("a number from 0 to 1", lambda v: 0 <= v <= 1)
NEGATIVE = Range("a number below 0", lambda v: v < 0)
ABOVE_ONE = Range("a number above 1", lambda v: v > 1)
INSIDE_SHARE = Range("a number strictly between 0 and 1", lambda v: 0 < v < 1)
TOP_P = Range("a number above 0, at most 1", lambda v: 0 < v <= 1)
NOT_EMPTY = Range("at least one entry", lambda v: len(v) > 0)


def spec_field(
    help: str, *, default: Any = NOTHING, range: Range | None = None, key: str | None = None
) -> Any:
    """One key of the language: its help text, default, range and (where Python forbids the name) its YAML key."""

    def check(_instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if range and value is not None and not isinstance(value, Schedule):
            if not range.accepts(value):
                raise ValueError(f"{attribute.name} must be {range.text}, not {value!r}")

    meta = {"help": help, "range": range, "key": key}
    return attrs.field(default=default, validator=check, metadata=meta, kw_only=True)


# ── scalars that change over a run ────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class Schedule:
    """A number that moves from one value to another over the first optimizer steps of a run."""

    start: float = spec_field("value at step 0", key="from")
    to: float = spec_field("value from `steps` on")
    steps: int = spec_field("optimizer steps over which it moves", range=AT_LEAST_ONE)
    shape: Literal["linear", "cosine"] = spec_field("how it moves", default="linear")
