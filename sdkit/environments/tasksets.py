"""verifiers environments of a run's data sets: rows that are tasks of a taskset are played as these tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.columns import parse_column, sources
from sdkit.data.tasksets import START_SECONDS, check_package, interpreter
from sdkit.environments.stepped import Episodes, number_in
from sdkit.language.specs import DataSpec, Table, VerifiersEnvironment, VerifiersSource


@frozen
class TaskRows:
    """What an environment needs to know of rows that are the tasks of its taskset."""

    config: Table[str | bool | int | float]  # of the taskset
    show_prompt: bool  # whether the rows show the task's prompt


def task_rows(spec: VerifiersEnvironment, data: DataSpec | None) -> TaskRows | None:
    """Returns what the environment needs to know of the rows if they are tasks of its taskset; None for other rows."""
    if data is None or not isinstance(data.source, VerifiersSource) or data.source.id != spec.id:
        return None
    prompt = (data.columns or {}).get("prompt")
    shows = prompt is not None and "prompt" in sources(parse_column("prompt", prompt))
    return TaskRows(data.source.config, shows)


class TaskEpisodes(Episodes):
    """Plays the first `tasks` tasks of a taskset, or all, each in a process of its own.

    Raises as `Episodes` does, and BadEnvironment without the package.
    """

    def __init__(self, spec: VerifiersEnvironment, base: Path, rows: TaskRows | None, tasks: int | None) -> None:
        if spec.python is None:
            check_package("an environment")
        self._column = spec.task_column
        self._rows = rows
        config = rows.config if rows else spec.config
        arguments = {"id": spec.id, "config": dict(config), "tasks": tasks}
        super().__init__(
            spec, f"verifiers {spec.id}", arguments, python=interpreter(spec.python, base), start_seconds=START_SECONDS
        )

    def _of_reset(self, row: Row, seed: int) -> Mapping[str, Any]:
        if self._rows is None:
            return {"task": number_in(row, self._column), "shows_prompt": False}
        return {"task": row.text(self._column), "shows_prompt": self._rows.show_prompt}


def open_tasksets(
    spec: VerifiersEnvironment, data: Mapping[str | None, DataSpec | None], base: Path
) -> dict[str | None, TaskEpisodes]:
    """Returns the environment of each data set; those that play tasks of one taskset share it.  Raises as `TaskEpisodes` does."""
    rows = {name: task_rows(spec, each) for name, each in data.items()}
    opened: dict[TaskRows | None, TaskEpisodes] = {}
    for each in dict.fromkeys(rows.values()):
        limits = [part.limit for name, part in data.items() if part and rows[name] == each]
        tasks = _largest(limits) if each else spec.tasks
        opened[each] = TaskEpisodes(spec, base, each, tasks)
    return {name: opened[each] for name, each in rows.items()}


def _largest(limits: Iterable[int | None]) -> int | None:
    """Returns the largest limit; None: no limit."""
    return max(limits, key=lambda limit: math.inf if limit is None else limit)
