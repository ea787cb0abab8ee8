"""One episode of a gymnasium environment as a class with `reset` and `reply`; runs in the process of a trajectory."""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from sdkit.language.templates import Field, Template, fill, parse, text_at

FIGURES = 4
"""Significant figures of a number in an observation."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""What colours text in a terminal."""


class Episode:
    """Steps an environment by actions that are written as text.

    `observation` and `unparsable` are templates.  `choices` name the actions of a Discrete space in order.
    """

    @classmethod
    def _prepare(cls, id: str, file: str | None, arguments: dict[str, Any], choices: list[str], **rest: Any) -> None:
        """Import the user's file, and make the environment once.  Raises ValueError if replies cannot be its actions."""
        if file:
            _import(Path(file))
        environment = gymnasium.make(id, **arguments)
        try:
            _check(environment, choices)
        finally:
            environment.close()

    def __init__(
        self,
        id: str,
        file: str | None,
        arguments: dict[str, Any],
        observation: str,
        unparsable: str,
        choices: list[str],
        trajectory_reward: str,
    ) -> None:
        self._environment = gymnasium.make(id, **arguments)
        self._observation, self._unparsable = parse(observation), parse(unparsable)
        self._choices = choices
        self._sums = trajectory_reward == "sum"
        self._reward = 0.0

    def reset(self, seed: int, options: dict[str, Any] | None) -> str:
        """Return the text of the first observation."""
        observation, _ = self._environment.reset(seed=seed, options=options)
        return self._show(observation)

    def reply(self, text: str | None) -> tuple[str | None, float]:
        """Return the next observation, or None at the end of the episode, and the reward.

        A text that is no action (None, or not of the action space) is no step.
        """
        action = None if text is None else read_action(self._environment.action_space, text, self._choices)
        if action is None:
            actions = describe_actions(self._environment.action_space, self._choices)
            return fill(self._unparsable, lambda _: actions), 0.0
        observation, reward, terminated, truncated, _ = self._environment.step(action)
        self._reward = self._reward * self._sums + float(reward)
        return (None if terminated or truncated else self._show(observation)), float(reward)

    def get_reward(self) -> float:
        return self._reward

    def close(self) -> None:
        self._environment.close()

    def _show(self, observation: Any) -> str:
        render = self._environment.render() if _uses(self._observation, "render") else None
        drawn = COLOUR.sub("", render) if isinstance(render, str) else plain(render)
        values = {"observation": plain(observation), "render": drawn}
        return fill(self._observation, lambda field: text_at(values, field))


def _import(path: Path) -> None:
    """Import the file that registers the environment, and let it import the modules beside it."""
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)


def _check(environment: Any, choices: list[str]) -> None:
    space = environment.action_space
    if choices:
        if not isinstance(space, spaces.Discrete):
            raise ValueError(f"choices name the actions of a Discrete space, but the action space is {space}")
        if len(choices) != space.n:
            raise ValueError(f"there are {len(choices)} choices, but {space.n} actions")


def _uses(template: Template, name: str) -> bool:
    return any(isinstance(part, Field) and part.name == name for part in template)


def plain(value: Any) -> Any:
    """Return an observation as text, numbers, lists and maps, with few figures of each number."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # of numpy
        return plain(value.tolist())
    return float(f"{value:.{FIGURES}g}") if isinstance(value, float) else value


def read_action(space: Any, text: str, choices: list[str]) -> Any:
    """Return the action of `space` that a text is; None if it is none.

    With choices: the last of them that stands in the text as a word of its own.  Otherwise the text itself for a Text
    space, a number for a Discrete one, and JSON for others.
    """
    if choices:
        words = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
        found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE)
        place = [choice.casefold() for choice in choices].index(found[-1].casefold()) if found else None
        return None if place is None else int(space.start) + place
    if isinstance(space, spaces.Text):
        return text if space.contains(text) else None
    try:
        action = _as_member(space, json.loads(text))
        return action if space.contains(action) else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _as_member(space: Any, value: Any) -> Any:
    """Return what a value of JSON stands for in a space.  Raises what numpy raises if it stands for nothing."""
    match space:
        case spaces.Dict():
            return {key: _as_member(part, value[key]) for key, part in space.items()}
        case spaces.Tuple():
            return tuple(_as_member(part, each) for part, each in zip(space, value, strict=True))
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            return np.asarray(value, dtype=space.dtype)
        case _:
            return None if isinstance(value, bool) else value


def describe_actions(space: Any, choices: list[str]) -> str:
    """Return in words what actions are."""
    if choices:
        return f"one of {', '.join(choices)}"
    if isinstance(space, spaces.Discrete):
        return f"a whole number from {space.start} to {space.start + space.n - 1}"
    if isinstance(space, spaces.Text):
        return f"a text of {space.min_length} to {space.max_length} of its characters"
    return f"JSON of {space}"
