"""A different environment for each row, by a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sdkit.batches import Row
from sdkit.environments.interface import Environment, Opened, Reply, Turn
from sdkit.language.specs import BaseEnvironment, RoutedEnvironment
from sdkit.language.specs import Environment as EnvironmentSpec

T = TypeVar("T")
Handle = tuple[str, Any]
"""The name of a trajectory's route, and its handle there."""


def route_of(spec: EnvironmentSpec, row: Row) -> BaseEnvironment:
    """Returns the environment of a row.  Raises KeyError if its column names no route."""
    return spec.routes[row.text(spec.by) or ""] if isinstance(spec, RoutedEnvironment) else spec


class Routed:
    """Passes each trajectory to the environment of its route."""

    def __init__(self, spec: RoutedEnvironment, routes: Mapping[str, Environment]) -> None:
        self.max_turns = spec.max_turns
        self._by = spec.by
        self.routes = routes

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """None that all rows have: each route has its own."""
        return ()

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        def opened(name: str, environment: Environment, part: Sequence[tuple[Row, int]]) -> list[Opened]:
            return [
                Opened(handle=(name, each.handle), text=each.text, error=each.error) for each in environment.open(part)
            ]

        return self._spread([row.text(self._by) or "" for row, _ in starts], starts, opened)

    def reply(self, turns: Sequence[tuple[Handle, Turn]]) -> list[Reply]:
        inner = [(handle[1], turn) for handle, turn in turns]
        return self._spread([handle[0] for handle, _ in turns], inner, lambda _, env, part: env.reply(part))

    def end(self, trajectories: Sequence[Handle]) -> list[float | None]:
        names, inner = [name for name, _ in trajectories], [handle for _, handle in trajectories]
        return self._spread(names, inner, lambda _, environment, part: environment.end(part))

    def close(self) -> None:
        for route in self.routes.values():
            route.close()

    def _spread(
        self, names: Sequence[str], items: Sequence[Any], call: Callable[[str, Environment, list[Any]], list[T]]
    ) -> list[T]:
        """Returns what the call of each route returns for its items, in the order of the items."""
        values: dict[int, T] = {}
        for name, environment in self.routes.items():
            places = [place for place, each in enumerate(names) if each == name]
            if places:
                values |= zip(places, call(name, environment, [items[place] for place in places]), strict=True)
        return [values[place] for place in range(len(items))]
