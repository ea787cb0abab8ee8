"""Trajectories: completions of several turns, and the environments that reply in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from sdkit.environments.file import UserEnvironment
from sdkit.environments.interface import Environment
from sdkit.environments.retry import Retry
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
        case specs.RetryEnvironment():
            judge = spec.reward or default or ""
            return {name: Retry(spec, scorers[judge]) for name, scorers in rewards.items()}
        case specs.FileEnvironment() | specs.ToolsEnvironment():
            return dict.fromkeys(rewards, UserEnvironment(spec, base))
        case _:
            assert_never(spec)
