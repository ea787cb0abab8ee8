"""A user's class as an environment: `reset(**columns)`, `reply(text)`, and optionally `get_reward()` and `close()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.batches import Row
from sdkit.environments.host import Fault, Host, Process, finite
from sdkit.environments.interface import Message, Opened, Reply, Turn
from sdkit.language.errors import BadData, Place, shorten
from sdkit.language.specs import FileEnvironment


class UserEnvironment:
    """Hosts an instance of the class for each trajectory.

    Raises BadData if the file cannot be loaded, and with `on_error: stop_run` if a call fails, is late or returns anything
    else than it should.
    """

    def __init__(self, spec: FileEnvironment, base: Path) -> None:
        self.max_turns = spec.max_turns
        self._spec = spec
        path = (base / spec.file).resolve()
        self._host = Host(spec.file, path, spec.class_name, spec.arguments, spec.call_seconds)
        self._host.start()

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        processes = [self._host.fork() for _ in starts]
        requests = [{"call": "open", "seed": seed, "arguments": self._columns(row)} for row, seed in starts]
        for process, value in zip(processes, self._call("reset", processes, requests), strict=True):
            if value is not None and not isinstance(value, Fault):
                process.fault = self._fault(
                    "reset", Fault(message=f"returned {type(value).__name__}; it must return None")
                )
        return [Opened(handle=process, error=process.fault and process.fault.message) for process in processes]

    def reply(self, turns: Sequence[tuple[Process, Turn]]) -> list[Reply]:
        requests = [{"call": "reply", "arguments": {"text": turn.text}} for _, turn in turns]
        values = self._call("reply", [process for process, _ in turns], requests)
        return [self._reply(value) for value in values]

    def end(self, trajectories: Sequence[Process]) -> list[float | None]:
        rewards: list[float | None] = []
        asked = [{"call": "get_reward", "arguments": {}} for _ in trajectories]
        for value in self._call("get_reward", trajectories, asked):
            if not (value is None or isinstance(value, Fault) or finite(value)):
                self._fault(
                    "get_reward", Fault(message=f"returned {type(value).__name__}; it must return a finite number")
                )
            rewards.append(float(value) if finite(value) else None)
        self._call("close", trajectories, [{"call": "close", "arguments": {}} for _ in trajectories])
        for process in trajectories:
            process.end()
        return rewards

    def close(self) -> None:
        """End every process."""
        self._host.close()

    def _columns(self, row: Row) -> dict[str, Any]:
        names = self._spec.columns or row.columns
        return {name: row.columns.get(name) for name in names}

    def _call(self, name: str, processes: Sequence[Process], requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        earlier = [process.fault for process in processes]
        values = self._host.call(list(zip(processes, requests, strict=True)))
        for value, before in zip(values, earlier, strict=True):
            if isinstance(value, Fault) and before is None:
                self._fault(name, value)
        return values

    def _fault(self, name: str, fault: Fault) -> Fault:
        """Raise BadData if an error ends the run."""
        if self._spec.on_error == "stop_run":
            place = Place(self._spec.file, fault.line, 1) if fault.line else None
            raise BadData(
                f"{self._spec.class_name}.{name} in {self._spec.file}: {fault.message}",
                place=place,
                hint="with on_error: end only the trajectory ends",
            )
        return fault

    def _reply(self, value: Any) -> Reply:
        if isinstance(value, Fault):
            return Reply(error=value.message)
        text, reward = value if isinstance(value, list) and len(value) == 2 else (value, None)
        if (text is None or isinstance(text, str)) and (reward is None or finite(reward)):
            shown = () if text is None else (Message(role="user", content=text),)
            return Reply(messages=shown, reward=None if reward is None else float(reward))
        wanted = "text or None, or such a value and a finite number"
        fault = self._fault("reply", Fault(message=f"returned {shorten(value)}; it must return {wanted}"))
        return Reply(error=fault.message)
