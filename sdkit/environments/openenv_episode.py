"""One episode on an OpenEnv server as a class with `reset` and `reply`; runs in the process of a trajectory.

A web socket at /ws is a session.  Messages are JSON: {"type": "reset" | "step" | "close", "data": …}, answered by
{"type": "observation", "data": {"observation": …, "reward": …, "done": …}} or {"type": "error", "data": {"message", "code"}}
(github.com/meta-pytorch/OpenEnv, openenv 0.10: the HTTP server of its core).
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from sdkit.language.templates import fill, parse, text_at

START_SECONDS = 20.0
"""How long the server may take to give its schema."""
INVALID = ("VALIDATION_ERROR", "INVALID_JSON")
"""Codes of a server's errors for a step whose action is not valid; the episode goes on."""
FULL = "CAPACITY_REACHED"


class Episode:
    """A session of its own, whose actions are written as text.

    `observation` and `unparsable` are templates.  `action_field` gets a reply as its text; None: the only required field
    of the server's actions if it is a text, and otherwise a reply is JSON.
    """

    _schema: dict[str, Any] = {}

    @classmethod
    def _prepare(cls, url: str, loopback: bool, action_field: str | None, **rest: Any) -> None:
        """Read what the server's actions are.  Raises OSError or ValueError if it cannot be reached or has no such field."""
        handlers = [urllib.request.ProxyHandler({})] if loopback else []
        with urllib.request.build_opener(*handlers).open(f"{url}/schema", timeout=START_SECONDS) as response:
            cls._schema = json.load(response)["action"]
        known = [name for name in cls._schema.get("properties", {}) if name != "metadata"]
        if action_field is not None and action_field not in known:
            raise ValueError(f"the server's actions have no field {action_field!r}, only {', '.join(known)}")

    def __init__(
        self,
        url: str,
        loopback: bool,
        action_field: str | None,
        observation: str,
        unparsable: str,
        trajectory_reward: str,
    ) -> None:
        address = f"ws{url.removeprefix('http')}/ws"
        self._socket: ClientConnection = connect(address, open_timeout=None, proxy=None if loopback else True)
        self._field = action_field
        self._observation, self._unparsable = parse(observation), parse(unparsable)
        self._sums = trajectory_reward == "sum"
        self._reward = 0.0
        self._done = False

    def reset(self, seed: int, options: dict[str, Any]) -> str:
        """Return the text of the first observation."""
        data, error = self._ask("reset", {**options, "seed": seed})
        if error:
            raise RuntimeError(error)
        self._done = bool(data["done"])
        return self._show(data)

    def reply(self, text: str | None) -> tuple[str | None, float]:
        """Return the next observation, or None at the end of the episode, and the reward.

        A text that is no action (None, or refused by the server as invalid) is no step.
        """
        if self._done:
            return None, 0.0
        action = None if text is None else read_action(self._schema, text, self._field)
        data, error = self._ask("step", action) if action is not None else ({}, "")
        if not data:
            actions = describe_actions(self._schema, self._field)
            return fill(self._unparsable, lambda field: {"actions": actions, "error": error}[field.name]), 0.0
        reward = float(data["reward"] or 0.0)
        self._done = bool(data["done"])
        self._reward = self._reward * self._sums + reward
        return (None if self._done else self._show(data)), reward

    def get_reward(self) -> float:
        return self._reward

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._socket.send(json.dumps({"type": "close"}))
            self._socket.close()

    def _ask(self, kind: str, data: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Return an observation's data and "", or {} and why the action is invalid.  Raises RuntimeError for other errors."""
        with contextlib.suppress(ConnectionClosed):  # of a server that sent why before it closed
            self._socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self._socket.recv())
        if answer["type"] == "observation":
            return answer["data"], ""
        fault = answer["data"]
        if fault.get("code") == FULL:
            raise RuntimeError(f"{fault['message']} (its max_concurrent_envs is smaller than a batch)")
        if fault.get("code") not in INVALID or kind == "reset":
            raise RuntimeError(f"the server answers {fault.get('code')}: {fault.get('message')}")
        return {}, "; ".join(_invalid(each) for each in fault.get("errors", [])) or fault["message"]

    def _show(self, data: dict[str, Any]) -> str:
        shown = {key: value for key, value in data["observation"].items() if key != "metadata" or value}
        return fill(self._observation, lambda field: text_at({"observation": shown}, field))


def _invalid(error: dict[str, Any]) -> str:
    return f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}".removeprefix(": ")


def text_field(schema: dict[str, Any], name: str | None) -> str | None:
    """Return the field of an action that a reply's text is; None: a reply is JSON."""
    required = schema.get("required", [])
    if name is None and len(required) == 1:
        (name,) = required
    return name if name and schema["properties"][name].get("type") == "string" else None


def read_action(schema: dict[str, Any], text: str, name: str | None) -> dict[str, Any] | None:
    """Return the action that a text is; None if it is none.

    A value that is no map becomes that of the named or only required field.
    """
    if field := text_field(schema, name):
        return {field: text}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    required = [name] if name else schema.get("required", [])
    if name is None and isinstance(value, dict):
        return value
    return {required[0]: value} if len(required) == 1 else None


def describe_actions(schema: dict[str, Any], name: str | None) -> str:
    """Return in words what actions are."""
    if text_field(schema, name):
        return "text"
    fields = {key: part for key, part in schema.get("properties", {}).items() if key != "metadata"}
    if name:
        fields = {name: fields[name]}
    types = [f"{key} ({part.get('type', 'value')})" for key, part in fields.items()]
    return f"JSON with {', '.join(types)}"
