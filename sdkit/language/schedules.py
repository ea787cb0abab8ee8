"""Schedules, numbers that change over a run: finds them in a spec and evaluates them at an optimizer step."""

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
    """Returns the value of a number or a schedule after `step` optimizer steps."""
    if not isinstance(value, Schedule):
        return float(value)
    progress = min(step / value.steps, 1.0)
    if value.shape == "cosine":
        progress = half_cosine(progress)
    return value.start + (value.to - value.start) * progress


def half_cosine(progress: float, *, falling: bool = False) -> float:
    """Returns half a cosine period: from 0 to 1 as `progress` goes from 0 to 1, or from 1 to 0 if `falling`."""
    cosine = math.cos(math.pi * progress)
    return (1 + cosine) / 2 if falling else (1 - cosine) / 2


def schedules(value: Any, path: Path = ()) -> Iterator[tuple[Path, Schedule]]:
    """Yields every schedule in a spec, with its path below `path`."""
    if isinstance(value, Schedule):
        yield path, value
    else:
        for name, part in _children(value):
            yield from schedules(part, (*path, name))


def at_step(spec: S, step: int) -> S:
    """Returns the spec with every schedule replaced by its value after `step` optimizer steps."""
    return with_schedules(spec, lambda schedule: scalar_at(schedule, step))


def with_schedules(spec: S, change: Callable[[Schedule], float | Schedule]) -> S:
    """Returns the spec with `change` applied to every schedule."""
    value: Any = spec
    if isinstance(value, Schedule):
        return change(value)  # pyright: ignore[reportReturnType]: S is float | Schedule here
    if isinstance(value, Table):
        return Table({n: with_schedules(part, change) for n, part in value.items()})  # pyright: ignore[reportReturnType]
    if isinstance(value, tuple):
        return tuple(with_schedules(part, change) for part in value)  # pyright: ignore[reportReturnType]
    if not attrs.has(type(value)) or not any(True for _ in schedules(value)):
        return spec
    parts = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return attrs.evolve(value, **{n: with_schedules(part, change) for n, part in parts.items()})


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yields the children of a map, a list or a spec, each with its key."""
    if isinstance(value, Table):
        yield from value.items()
    elif isinstance(value, tuple):
        yield from enumerate(value)
    elif attrs.has(type(value)):
        for name, key in keys_of(type(value)).items():
            yield name, getattr(value, key.field)
