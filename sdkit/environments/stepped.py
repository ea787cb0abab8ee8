"""Episodes of other packages and servers, one for each trajectory; gymnasium and OpenEnv, whose actions are written as text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

from attrs import evolve

from sdkit.batches import Row
from sdkit.environments.file import STOP_HINT, UserEnvironment
from sdkit.environments.host import START_SECONDS, EnvironmentFault, Fault, Host, Process, finite
from sdkit.environments.interface import Message, Opened, Reply, Turn
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.rules.served import is_loopback
from sdkit.language.specs import EpisodeEnvironment, GymnasiumEnvironment, OpenEnvEnvironment, SteppedEnvironment
from sdkit.rewards.answers import extract


class Episodes(UserEnvironment):
    """Runs an episode for each trajectory in a process of its own.

    `name` is what messages call the environment, `arguments` are those of its class `Episode`.  Raises BadData if the
    environment cannot be made or reached, and with `on_error: stop_run` EnvironmentFault if a call fails or is late.
    """

    def __init__(
        self,
        spec: EpisodeEnvironment,
        name: str,
        arguments: Mapping[str, Any],
        *,
        python: str = sys.executable,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.max_turns = spec.max_turns
        self._name, self._on_error = name, spec.on_error
        program = Path(__file__).with_name(f"{spec.kind}_episode.py")
        code = {"class": "Episode", "arguments": arguments}
        self._host = Host(
            name, program, code, spec.call_seconds, ours=True, python=python, start_seconds=start_seconds
        )
        self._host.start()

    def _opened(self, process: Process, value: Any) -> Opened:
        opened = super()._opened(process, value)
        return evolve(opened, error=f"{self._name}: {opened.error}") if opened.error else opened

    def _reply(self, value: Any) -> Reply:
        text, reward = value if isinstance(value, list) else (value, None)
        if not (reward is None or finite(reward)):
            text = self._fault("reply", Fault(message=f"its reward is {reward}, not a finite number", misfit=True))
        if isinstance(text, Fault):
            return Reply(error=f"{self._name}: {text.message}")
        shown = () if text is None else (Message(role="user", content=text),)
        return Reply(messages=shown, reward=reward)

    def _fault(self, name: str, fault: Fault) -> Fault:
        if self._on_error == "stop_run":
            raise EnvironmentFault(f"{self._name}: {name}: {fault.message}", call=name, fault=fault, hint=STOP_HINT)
        return fault


class SteppedEpisodes(Episodes):
    """Steps an environment by the actions in the turns.  Raises as `Episodes` does, and BadEnvironment without the package."""

    def __init__(self, spec: GymnasiumEnvironment | OpenEnvEnvironment, base: Path) -> None:
        self._stepped = spec
        super().__init__(spec, *_arguments(spec, base))

    def _text(self, turn: Turn) -> str | None:
        return extract(self._stepped.extract, turn.text)

    def _of_reset(self, row: Row, seed: int) -> Mapping[str, Any]:
        spec = self._stepped
        options = {name: row.columns.get(name) for name in spec.columns}
        return {"seed": seed if spec.seed_column is None else number_in(row, spec.seed_column), "options": options}


def number_in(row: Row, column: str) -> int:
    """Returns the seed, or the number of the task, in a row's column.  Raises BadData if it is none."""
    text = row.text(column) or ""
    if not (text.isdecimal() and int(text) < 2**63):
        raise BadData(f"row {row.index}: {column} is {text!r}, not a whole number from 0 to 2^63 - 1")
    return int(text)


def _arguments(spec: GymnasiumEnvironment | OpenEnvEnvironment, base: Path) -> tuple[str, dict[str, Any]]:
    """Returns what messages call the environment, and its class's own arguments.  Raises BadEnvironment."""
    match spec:
        case GymnasiumEnvironment():
            _need("gymnasium", "gymnasium")
            own = _texts(spec) | {
                "id": spec.id,
                "file": spec.file and str((base / spec.file).resolve()),
                "arguments": dict(spec.arguments),
                "choices": list(spec.choices),
            }
            return f"gymnasium {spec.id}", own
        case OpenEnvEnvironment():
            _need("websockets", "openenv")
            loopback = is_loopback(urlsplit(spec.url).hostname or "")
            own = _texts(spec) | {"url": spec.url.rstrip("/"), "loopback": loopback, "action_field": spec.action_field}
            return f"openenv {spec.url}", own
        case _:
            assert_never(spec)


def _texts(spec: SteppedEnvironment) -> dict[str, Any]:
    return {
        "observation": spec.observation,
        "unparsable": spec.unparsable,
        "trajectory_reward": spec.trajectory_reward,
    }


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        message = f"environments of kind {extra} need a package that is missing: {module}"
        raise BadEnvironment(message, hint=f"pip install 'sdkit[{extra}]'")
