"""The means to declare spec classes.  Specs are pure data: no torch, no files, no derived values.

A class is a map in YAML; its fields are the keys.  `kind` selects a member of a union; a member whose fields all have
defaults can be written as its bare kind (`divergence: forward_kl`).  Each field has a help text and a range, which
errors and the generated docs read.  Every number has a lower and an upper bound, and text must not be empty unless its
field allows it.  The members of a union that `sdkit plan` describes are components: each describes itself, and says
what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import attrs
from attrs import NOTHING, frozen

T_co = TypeVar("T_co", covariant=True)


class Table(Mapping[str, T_co]):
    """An immutable, hashable map from names to specs, in the order of the YAML file."""

    def __init__(self, items: Mapping[str, T_co] | None = None) -> None:
        self._items: dict[str, T_co] = dict(items or {})

    def __getitem__(self, key: str) -> T_co:
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


class Component:
    """One kind of answer to a question of the language, such as a divergence."""

    __slots__ = ()
    kind: ClassVar[str]
    description: ClassVar[str]
    """The text that `sdkit plan` shows, with `{0.name}` for the value of a field."""

    def describe(self) -> str:
        """Returns the text that `sdkit plan` shows."""
        return self.description.format(self)


@frozen
class Range:
    """The values a field accepts.

    `text` describes them in error messages, `schema` has the keywords of JSON Schema for them (a schema may accept
    more), `ends` are the bounds of a number.
    """

    text: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any] = attrs.field(eq=False)
    ends: tuple[float, float] | None = None


SMALLEST, LARGEST = 1e-12, 1e6
"""Magnitudes that float32 can square, multiply and sum without underflow or overflow."""


def between(low: float, high: float, *, apart_from: tuple[float, ...] = ()) -> Range:
    """The numbers from `low` to `high`, inclusive, and those in `apart_from`."""
    is_integer = isinstance(low, int) and isinstance(high, int)
    noun = "a whole number" if is_integer and high > 1 else "a number"
    text = f"{noun} from {_figure(low)} to {_figure(high)}"
    text = ", ".join([*map(_figure, apart_from), f"or {text}" if apart_from else text])
    ends = (min(low, *apart_from), max(high, *apart_from)) if apart_from else (low, high)
    schema: dict[str, Any] = {"minimum": low, "maximum": high}
    if apart_from:
        schema = {"anyOf": [{"enum": list(apart_from)}, schema]}
    return Range(text, lambda v: low <= v <= high or v in apart_from, schema, ends)


def _figure(number: float) -> str:
    """`1e6`, not `1e+06`."""
    text = str(number) if isinstance(number, int) else f"{number:.6g}"
    return re.sub("e[+]?(-?)0*", r"e\1", text)


POSITIVE = between(SMALLEST, LARGEST)
NOT_NEGATIVE = between(SMALLEST, LARGEST, apart_from=(0,))
NEGATIVE = between(-LARGEST, -SMALLEST)
SIGNED = Range(
    f"0, or a number of magnitude {_figure(SMALLEST)} to {_figure(LARGEST)}",
    lambda v: v == 0 or SMALLEST <= abs(v) <= LARGEST,
    {"anyOf": [{"enum": [0]}, POSITIVE.schema, NEGATIVE.schema]},
    (-LARGEST, LARGEST),
)
ABOVE_ONE = between(1.00001, LARGEST)
SHARE = between(1e-6, 0.999999, apart_from=(0, 1))
INSIDE_SHARE = between(1e-6, 0.999999)
TOP_P = between(1e-6, 1.0)
TEMPERATURE = between(0.01, 100.0)
"""vLLM raises temperatures below 0.01 to 0.01."""
GREEDY_OR_TEMPERATURE = between(0.01, 100.0, apart_from=(0,))
POWER = between(1e-6, 100.0)
POWER_OR_ZERO = between(1e-6, 100.0, apart_from=(0,))
SECONDS = between(0.001, LARGEST)
GIBIBYTES = between(0.001, LARGEST)

MOST = 10**9
AT_LEAST_ONE = between(1, MOST)
ONE_OR_ALL = Range(
    "`all`, or a whole number from 1 to 1000",
    lambda v: v == "all" if isinstance(v, str) else 1 <= v <= 1000,
    {"anyOf": [{"enum": ["all"]}, {"type": "number", "minimum": 1, "maximum": 1000}]},
    (1, 1000),
)
NOT_NEGATIVE_COUNT = between(0, MOST)
AT_LEAST_64 = between(64, MOST)
SEED = between(0, 2**32 - 1)
"""The seeds that every library's generator accepts."""
PARAMETERS = between(1, 10**15)
OPTION = Range(
    "text, true, false, or a number of magnitude up to 1e15",
    lambda v: isinstance(v, str) or abs(v) <= 1e15,
    {"minimum": -1e15, "maximum": 1e15},
    (-1e15, 1e15),
)

NOT_EMPTY = Range("at least one entry", lambda v: len(v) > 0, {"minItems": 1, "minProperties": 1})
TEXT = Range("text with more than white space", lambda v: bool(v.strip()), {"pattern": r"\S"})
SOME_TEXT = Range("at least one character", lambda v: len(v) > 0, {"minLength": 1})
PATTERN = Range(
    "a pattern of 1 to 10000 characters", lambda v: 0 < len(v) <= 10_000, {"minLength": 1, "maxLength": 10_000}
)
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_HAS_CONTROL = re.compile(f"[{_CONTROL}]")
TEXT_END = r"(?![\s\S])"
"""The end of a text, in the regular expressions of ECMAScript and Python; Python's `$` ignores a last line break."""
_ONE_LINE = rf"^(?=.*\S)[^{_CONTROL}]*{TEXT_END}"
NAME = Range(
    "a name of at most 1000 characters on one line",
    lambda v: bool(v.strip()) and len(v) <= 1000 and not _HAS_CONTROL.search(v),
    {"pattern": _ONE_LINE, "maxLength": 1000},
)
PATH = Range(
    "a path of at most 4000 bytes on one line",
    lambda v: bool(v.strip()) and len(v.encode("utf-8", "surrogatepass")) <= 4000 and not _HAS_CONTROL.search(v),
    {"pattern": _ONE_LINE, "maxLength": 4000},
)


PathTo = Literal["file", "model", "output"]
"""What a path names: a file or folder; a model, which may also be bundled or of the hub; or what a run writes, whose path
starts at the working directory wherever it is written.
"""


def spec_field(
    help: str,
    *,
    default: Any = NOTHING,
    range: Range | None = None,
    each: Range | None = None,
    names: Range | None = None,
    key: str | None = None,
    path_to: PathTo | None = None,
) -> Any:
    """One key of the language: its help text, default, range and, if Python reserves the name, its YAML key.

    `each` is the range of each text or number in a list or table, `names` that of a table's names.  `path_to` says what
    the path names if the value is one.
    """
    range = PATH if path_to else range

    def check(_instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if range and value is not None and not isinstance(value, Schedule):
            _check(range, value, attribute.name)
        if names and isinstance(value, Table):
            for name in value:
                _check(names, name, attribute.name)
        if each:
            for item in scalars_of(value):
                _check(each, item, attribute.name)

    meta = {"help": help, "range": range, "each": each, "names": names, "key": key, "path_to": path_to}
    return attrs.field(default=default, validator=check, metadata=meta, kw_only=True)


def scalars_of(value: Any) -> list[str | int | float]:
    """The texts and numbers directly in a list or table; empty for any other value."""
    items = value.values() if isinstance(value, Table) else value
    return [x for x in items if isinstance(x, str | int | float)] if isinstance(value, Table | tuple) else []


def _check(range: Range, value: Any, field: str) -> None:
    if not range.accepts(value):
        raise ValueError(f"{field} must be {range.text}, not {value!r}")


@frozen(kw_only=True)
class Schedule:
    """A number that changes from one value to another over the first optimizer steps of a run."""

    start: float = spec_field("value at step 0", key="from", range=SIGNED)
    to: float = spec_field("value from `steps` on", range=SIGNED)
    steps: int = spec_field("optimizer steps of the transition", range=AT_LEAST_ONE)
    shape: Literal["linear", "cosine"] = spec_field("shape of the transition", default="linear")

    def __format__(self, number: str) -> str:
        """Returns the schedule in words, its ends in the format of a number: `0.1 → 0 over 50 steps`."""
        return f"{self.start:{number}} → {self.to:{number}} over {self.steps} steps"


if TYPE_CHECKING:
    Scheduled = float
else:
    Scheduled = float | Schedule
"""A number that may be a schedule.

Type checkers see a float, because code that computes reads specs whose schedules `at_step` has resolved.
"""


def always(value: Scheduled, number: float) -> bool:
    """Whether the value equals `number` during the whole run."""
    if isinstance(value, Schedule):
        return value.start == value.to == number
    return value == number


def as_factor(value: Scheduled) -> str:
    """Returns the value as a factor before another text: `0.5 × `; empty for 1."""
    if isinstance(value, Schedule):
        return f"({value:g}) × "
    return "" if value == 1 else f"{value:g} × "
