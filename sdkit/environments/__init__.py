"""Trajectories: completions of several turns, and the environments that reply in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from sdkit.environments.file import UserEnvironment
from sdkit.environments.interface import Environment
from sdkit.environments.retry import Retry
from sdkit.environments.routed import Routed
from sdkit.environments.stepped import Episodes
from sdkit.language import specs
from sdkit.rewards.scorer import Scorer


def open_environments(
    spec: specs.Environment, rewards: Mapping[str | None, Mapping[str, Scorer]], default: str | None, base: Path
) -> dict[str | None, Environment]:
    """Returns the environment for each data set of which `rewards` has the scorers; `default` names the training reward.

    A user's code does not depend on the data set: one server hosts it.  Paths start at `base`.  Raises BadData if a
    user's file cannot be loaded.
    """
    match spec:
        case specs.RoutedEnvironment():
            opened = {name: open_environments(route, rewards, default, base) for name, route in spec.routes.items()}
            return {part: Routed(spec, {name: of[part] for name, of in opened.items()}) for part in rewards}
        case specs.RetryEnvironment():
            judge = spec.reward or default or ""
            return {name: Retry(spec, scorers[judge]) for name, scorers in rewards.items()}
        case specs.FileEnvironment() | specs.ToolsEnvironment():
            return dict.fromkeys(rewards, UserEnvironment(spec, base))
        case specs.GymnasiumEnvironment() | specs.OpenEnvEnvironment() | specs.VerifiersEnvironment():
            return dict.fromkeys(rewards, Episodes(spec, base))
        case _:
            assert_never(spec)
