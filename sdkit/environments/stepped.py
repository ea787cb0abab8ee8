"""Environments of other packages and servers: each trajectory is an episode, whose observations and actions are text."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

from attrs import evolve

from sdkit.batches import Row
from sdkit.environments.file import UserEnvironment
from sdkit.environments.host import Fault, Host, Process
from sdkit.environments.interface import Opened, Reply, Turn
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.rules.served import is_loopback
from sdkit.language.specs import GymnasiumEnvironment, OpenEnvEnvironment
from sdkit.rewards.answers import extract

Stepped = GymnasiumEnvironment | OpenEnvEnvironment


class Episodes(UserEnvironment):
    """Runs an episode for each trajectory in a process of its own.

    Raises BadEnvironment without the package, BadData if the environment cannot be made or reached, and with
    `on_error: stop_run` if a call fails or is late.
    """

    def __init__(self, spec: Stepped, base: Path) -> None:
        self.max_turns = spec.max_turns
        self._stepped = spec
        self._name, own = _arguments(spec, base)
        texts = {
            "observation": spec.observation,
            "unparsable": spec.unparsable,
            "trajectory_reward": spec.trajectory_reward,
        }
        program = Path(__file__).with_name(f"{spec.kind}_episode.py")
        self._host = Host(self._name, program, "Episode", own | texts, spec.call_seconds, ours=True)
        self._host.start()

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        processes = [self._host.fork() for _ in starts]
        requests = [{"call": "open", "seed": seed, "arguments": self._reset(row, seed)} for row, seed in starts]
        values = self._call("reset", processes, requests)
        return [
            Opened(handle=process, error=f"{self._name}: {value.message}")
            if isinstance(value, Fault)
            else Opened(handle=process, text=value)
            for process, value in zip(processes, values, strict=True)
        ]

    def reply(self, turns: Sequence[tuple[Process, Turn]]) -> list[Reply]:
        how = self._stepped.extract
        requests = [{"call": "reply", "arguments": {"text": extract(how, turn.text)}} for _, turn in turns]
        replies = map(self._reply, self._call("reply", [process for process, _ in turns], requests))
        return [evolve(reply, error=f"{self._name}: {reply.error}") if reply.error else reply for reply in replies]

    def _reset(self, row: Row, seed: int) -> Mapping[str, Any]:
        options = {name: row.columns.get(name) for name in self._stepped.columns}
        column = self._stepped.seed_column
        return {"seed": seed if column is None else seed_in(row, column), "options": options}

    def _fault(self, name: str, fault: Fault) -> Fault:
        if self._stepped.on_error == "stop_run":
            hint = "with on_error: end only the trajectory ends"
            raise BadData(f"{self._name}: {name}: {fault.message}", hint=hint)
        return fault


def seed_in(row: Row, column: str) -> int:
    """Returns the seed in a row's column.  Raises BadData if it is none."""
    text = row.text(column) or ""
    if not (text.isdecimal() and int(text) < 2**63):
        raise BadData(f"row {row.index}: {column} is {text!r}, not a seed: a whole number from 0 to 2^63 - 1")
    return int(text)


def _arguments(spec: Stepped, base: Path) -> tuple[str, dict[str, Any]]:
    """Returns what messages call the environment, and its class's own arguments.  Raises BadEnvironment."""
    match spec:
        case GymnasiumEnvironment():
            _need("gymnasium", "gymnasium")
            own = {
                "id": spec.id,
                "file": spec.file and str((base / spec.file).resolve()),
                "arguments": dict(spec.arguments),
                "choices": list(spec.choices),
            }
            return f"gymnasium {spec.id}", own
        case OpenEnvEnvironment():
            _need("websockets", "openenv")
            loopback = is_loopback(urlsplit(spec.url).hostname or "")
            own = {"url": spec.url.rstrip("/"), "loopback": loopback, "action_field": spec.action_field}
            return f"openenv {spec.url}", own
        case _:
            assert_never(spec)


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        message = f"environments of kind {extra} need a package that is missing: {module}"
        raise BadEnvironment(message, hint=f"pip install 'sdkit[{extra}]'")
