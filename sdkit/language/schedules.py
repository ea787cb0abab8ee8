"""Numbers that move over a run: found anywhere in a spec, and put into plain numbers for one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs

from sdkit.language.errors import Path
from sdkit.language.introspection import keys_of
from sdkit.language.specs import Schedule, Table

S = TypeVar("S")


def scalar_at(value: float | Schedule, step: int) -> float:
    """The value of a number that may move, after `step` optimizer steps."""
    if not isinstance(value, Schedule):
        return float(value)
    share = min(step / value.steps, 1.0)
    if value.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return value.start + (value.to - value.start) * share


def always(value: float | Schedule, number: float) -> bool:
    """Whether a number has one value, this one, over the whole run."""
    if isinstance(value, Schedule):
        return value.start == value.to == number
    return value == number


def plain(value: float | Schedule) -> float:
    """A number of a spec that went through `at_step`.  Raises TypeError for one that still moves."""
    if isinstance(value, Schedule):
        raise TypeError("a number that moves has no value without its step")
    return value


def schedules(value: Any, path: Path = ()) -> Iterator[tuple[Path, Schedule]]:
    """Every schedule in a spec, with the path of its key below `path`."""
    if isinstance(value, Schedule):
        yield path, value
    else:
        for name, part in _children(value):
            yield from schedules(part, (*path, name))


def at_step(spec: S, step: int) -> S:
    """The same spec with every schedule as the number it is after `step` optimizer steps."""
    return with_schedules(spec, lambda schedule: scalar_at(schedule, step))


def with_schedules(spec: S, change: Callable[[Schedule], float | Schedule]) -> S:
    """The same spec with every schedule changed."""
    value: Any = spec
    if isinstance(value, Schedule):
        return change(value)  # pyright: ignore[reportReturnType]: S is a scalar that may move
    if isinstance(value, Table):
        return Table({n: with_schedules(part, change) for n, part in value.items()})  # pyright: ignore[reportReturnType]
    if isinstance(value, tuple):
        return tuple(with_schedules(part, change) for part in value)  # pyright: ignore[reportReturnType]
    if not attrs.has(type(value)) or not any(True for _ in schedules(value)):
        return spec
    parts = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return attrs.evolve(value, **{n: with_schedules(part, change) for n, part in parts.items()})


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a map, a list or a spec holds, each under its key."""
    if isinstance(value, Table):
        yield from value.items()
    elif isinstance(value, tuple):
        yield from enumerate(value)
    elif attrs.has(type(value)):
        for name, key in keys_of(type(value)).items():
            yield name, getattr(value, key.field)
