"""Data sets of a run file with what they leave out, such as the taskset of the environment that plays its tasks."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from sdkit.language.errors import Path
from sdkit.language.specs import (
    DataSpec,
    Environment,
    ExperimentSpec,
    Table,
    VerifiersEnvironment,
    VerifiersSource,
    environments_of,
)


def players(source: VerifiersSource, environment: Environment | None) -> Iterator[tuple[Path, VerifiersEnvironment]]:
    """Yields the environments that may play the source's tasks, each with its path."""
    for path, each in environments_of(environment, VerifiersEnvironment):
        if source.id in (None, each.id):
            yield path, each


def data_in_full(spec: ExperimentSpec, data: DataSpec) -> DataSpec:
    """Returns a data set of a run file with what it leaves out: the columns of the training data, and for a `verifiers`
    source the taskset of the environment that plays its tasks.
    """
    source, columns = data.source, data.columns or spec.data.columns
    if isinstance(source, VerifiersSource):
        for _, player in players(source, spec.environment):
            config = Table({**player.config, **source.config})
            source = evolve(source, id=player.id, config=config, python=source.python or player.python)
            break
    return evolve(data, source=source, columns=columns)
