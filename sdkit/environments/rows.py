"""What an environment needs of the rows: the name of a route, seeds, and numbers of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sdkit.batches import Row
from sdkit.environments.routed import route_of
from sdkit.environments.stepped import number_in
from sdkit.environments.tasksets import task_rows
from sdkit.language.errors import BadData, first_of, listed, outside, shorten
from sdkit.language.specs import DataSpec, Environment, RoutedEnvironment, VerifiersEnvironment


def check_rows(spec: Environment | None, rows: Iterable[Row], data: DataSpec | None = None) -> None:
    """Raise BadData naming the rows whose column names no route, and those whose seed or task is none.

    `data` is the data set of the rows, as `data_in_full` returns it.
    """
    if spec is None:
        return
    routes = list(spec.routes) if isinstance(spec, RoutedEnvironment) else []
    faults = list(_faults(spec, routes, rows, data))
    if faults:
        hint = "environment.routes must have every value" if routes else None
        raise BadData(first_of(faults), hint=hint, path=("environment", "by") if routes else ("environment",))


def check_routes(spec: Environment | None, rows: Sequence[Row]) -> None:
    """Raise BadData naming the routes that no row has; `rows` are those of training and of every suite of the task."""
    if isinstance(spec, RoutedEnvironment):
        unused = [name for name in spec.routes if name not in {row.text(spec.by) for row in rows}]
        if unused:
            message = f"no row's {spec.by} is {listed(unused)}"
            raise BadData(message, hint="remove the route", path=("environment", "routes", unused[0]))


def _faults(spec: Environment, routes: Sequence[str], rows: Iterable[Row], data: DataSpec | None) -> Iterator[str]:
    for row in rows:
        if isinstance(spec, RoutedEnvironment) and (value := row.text(spec.by)) not in routes:
            yield f"row {row.index}: {spec.by} is {shorten(value)}, which {outside(routes)}"
            continue
        environment = route_of(spec, row)
        if isinstance(environment, VerifiersEnvironment) and task_rows(environment, data):
            if row.text(column := environment.task_column) != row.raw["key"]:
                yield f"row {row.index}: {column} is {shorten(row.text(column))}, not the key of the task"
            continue
        column = getattr(environment, "seed_column", None) or getattr(environment, "task_column", None)
        if column:
            try:
                number_in(row, column)
            except BadData as fault:
                yield fault.message
