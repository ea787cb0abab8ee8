"""Trajectories: completions of several turns, and the environments that reply in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import assert_never

from sdkit.environments.file import UserEnvironment
from sdkit.environments.interface import Environment
from sdkit.environments.retry import Retry
from sdkit.environments.routed import Routed
from sdkit.environments.stepped import SteppedEpisodes
from sdkit.environments.tasksets import open_tasksets
from sdkit.language import specs
from sdkit.rewards.scorer import Scorer


def open_environments(
    spec: specs.Environment,
    rewards: Mapping[str | None, Mapping[str, Scorer]],
    default: str | None,
    base: Path,
    data: Mapping[str | None, specs.DataSpec] = MappingProxyType({}),
) -> Mapping[str | None, Environment]:
    """Returns the environment for each data set of which `rewards` has the scorers; `default` names the training reward.

    `data` are the data sets with their columns, as `data_in_full` returns them, which a verifiers environment asks whose
    tasks the rows are.  Other code does not depend on the data set: one server hosts it.  Paths start at `base`.  Raises
    BadData if a user's file cannot be loaded.
    """
    match spec:
        case specs.RoutedEnvironment():
            opened = {
                name: open_environments(route, rewards, default, base, data) for name, route in spec.routes.items()
            }
            return {part: Routed(spec, {name: of[part] for name, of in opened.items()}) for part in rewards}
        case specs.RetryEnvironment():
            judge = spec.reward or default or ""
            return {name: Retry(spec, scorers[judge]) for name, scorers in rewards.items()}
        case specs.FileEnvironment() | specs.ToolsEnvironment():
            return dict.fromkeys(rewards, UserEnvironment(spec, base))
        case specs.GymnasiumEnvironment() | specs.OpenEnvEnvironment():
            return dict.fromkeys(rewards, SteppedEpisodes(spec, base))
        case specs.VerifiersEnvironment():
            return open_tasksets(spec, {name: data.get(name) for name in rewards}, base)
        case _:
            assert_never(spec)
