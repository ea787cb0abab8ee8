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


def open_environment(
    spec: specs.Environment, rewards: Mapping[str, Scorer], default: str | None, base: Path
) -> Environment:
    """Returns the environment of a spec; `rewards` score the rows at hand, `default` names the one used in training.

    Paths start at `base`.  Raises BadData if a user's file cannot be loaded.
    """
    match spec:
        case specs.RetryEnvironment():
            return Retry(spec, rewards[spec.reward or default or ""])
        case specs.FileEnvironment():
            return UserEnvironment(spec, base)
        case _:
            assert_never(spec)
