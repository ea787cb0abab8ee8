"""A user's class or functions as an environment: `reset`, then `reply` or tools, and optionally `get_reward` and `close`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from attrs import evolve

from sdkit.batches import Row
from sdkit.environments.host import EnvironmentFault, Fault, Host, Process, Request, finite
from sdkit.environments.interface import Message, Opened, Reply, Turn
from sdkit.environments.tool_calls import call_fault, error_text, result_message
from sdkit.language.errors import Place, shorten
from sdkit.language.specs import FileEnvironment, ToolsEnvironment

NAMES = {"open": "reset"}
"""Calls that have another name in the class."""
STOP_HINT = "with on_error: end only the trajectory ends"


class UserEnvironment:
    """Hosts the code in a process for each trajectory.

    Raises BadData if the file cannot be loaded, and with `on_error: stop_run` EnvironmentFault if a call fails, is late or
    returns anything else than it should.
    """

    def __init__(self, spec: FileEnvironment | ToolsEnvironment, base: Path) -> None:
        self.max_turns = spec.max_turns
        self._spec = spec
        self._host = Host(
            spec.file,
            (base / spec.file).resolve(),
            _code_of(spec),
            spec.call_seconds,
            spec.turn_seconds,
            survives=spec.on_error == "tell_model",
        )
        self._host.start()

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._host.tools

    def open(self, starts: Sequence[tuple[Row, int]]) -> list[Opened]:
        processes = [self._host.fork() for _ in starts]
        requests = [{"call": "open", "seed": seed, "arguments": self._of_reset(row, seed)} for row, seed in starts]
        values = self._call_each(processes, requests)
        return [self._opened(process, value) for process, value in zip(processes, values, strict=True)]

    def reply(self, turns: Sequence[tuple[Process, Turn]]) -> list[Reply]:
        if self.tools:
            return self._reply_to_calls(turns)
        requests = [{"call": "reply", "arguments": {"text": self._text(turn)}} for _, turn in turns]
        processes = [process for process, _ in turns]
        values = self._call_each(processes, requests)
        return [
            evolve(self._reply(value), seconds=process.seconds)
            for process, value in zip(processes, values, strict=True)
        ]

    def end(self, trajectories: Sequence[Process]) -> list[float | None]:
        rewards: list[float | None] = []
        asked = [{"call": "get_reward", "arguments": {}} for _ in trajectories]
        for value in self._call_each(trajectories, asked):
            if not (value is None or isinstance(value, Fault) or finite(value)):
                message = f"returned {type(value).__name__}; it must return a finite number"
                self._fault("get_reward", Fault(message=message, misfit=True))
            rewards.append(float(value) if finite(value) else None)
        self._call_each(trajectories, [{"call": "close", "arguments": {}} for _ in trajectories])
        for process in trajectories:
            process.end()
        return rewards

    def close(self) -> None:
        """End every process."""
        self._host.close()

    def _of_reset(self, row: Row, seed: int) -> Mapping[str, Any]:
        """The arguments of `reset`."""
        if not isinstance(self._spec, FileEnvironment):
            return {}
        names = self._spec.columns or row.columns
        return {name: row.columns.get(name) for name in names}

    def _text(self, turn: Turn) -> str | None:
        """The argument of `reply`."""
        return turn.text

    def _opened(self, process: Process, value: Any) -> Opened:
        if not (value is None or isinstance(value, str | Fault)):
            message = f"returned {shorten(value)}; it must return text or None"
            value = self._fault("reset", Fault(message=message, misfit=True))
        if isinstance(value, Fault):
            if process.fault is None:
                process.fail(value)
            return Opened(handle=process, error=value.message)
        return Opened(handle=process, text=value or None)

    def _reply_to_calls(self, turns: Sequence[tuple[Process, Turn]]) -> list[Reply]:
        """Run the calls of each turn that has some; the results are the observation."""
        faults = [[call_fault(self.tools, call) for call in turn.calls] for _, turn in turns]
        requests = [
            [
                {"call": call.name, "arguments": call.arguments, "tool": True}
                for call, fault in zip(turn.calls, own, strict=True)
                if fault is None
            ]
            for (_, turn), own in zip(turns, faults, strict=True)
        ]
        values = self._call([process for process, _ in turns], requests)
        return [
            evolve(self._results(process, turn, own, iter(results)), seconds=process.seconds)
            for (process, turn), own, results in zip(turns, faults, values, strict=True)
        ]

    def _results(self, process: Process, turn: Turn, faults: Sequence[str | None], values: Any) -> Reply:
        if process.fault:
            return Reply(error=process.fault.message)
        if turn.fault and self._spec.calls.unreadable == "end":
            return Reply(ending="parse_error")
        if turn.fault:
            return Reply(messages=(Message(role="user", content=f"Error: {turn.fault}"),))
        if not turn.calls:
            return Reply(ending="no_call")
        messages: list[Message] = []
        for call, fault in zip(turn.calls, faults, strict=True):
            value = Fault(message=fault) if fault else next(values)
            text = error_text(value.message) if isinstance(value, Fault) else value
            messages.append(result_message(call, text, self.tools))
        return Reply(messages=tuple(messages))

    def _call_each(self, processes: Sequence[Process], requests: Sequence[Request]) -> list[Any]:
        """The value of one call of each process, or its fault."""
        return [value for (value,) in self._call(processes, [[request] for request in requests])]

    def _call(self, processes: Sequence[Process], requests: Sequence[Sequence[Request]]) -> list[list[Any]]:
        earlier = [process.fault for process in processes]
        values = self._host.call(list(zip(processes, requests, strict=True)))
        for own, asked, before in zip(values, requests, earlier, strict=True):
            faults = [pair for pair in zip(asked, own, strict=True) if isinstance(pair[1], Fault)]
            if faults and before is None:
                request, fault = faults[0]
                self._fault(NAMES.get(request["call"]) or request["call"], fault)
        return values

    def _fault(self, name: str, fault: Fault) -> Fault:
        """Raise EnvironmentFault if an error ends the run."""
        if self._spec.on_error == "stop_run":
            what = f"{self._spec.class_name}.{name}" if isinstance(self._spec, FileEnvironment) else name
            raise EnvironmentFault(
                f"{what} in {self._spec.file}: {fault.message}",
                call=name,
                fault=fault,
                place=Place(self._spec.file, fault.line, 1) if fault.line else None,
                hint=STOP_HINT,
            )
        return fault

    def _reply(self, value: Any) -> Reply:
        if isinstance(value, Fault) and value.raised and self._spec.on_error == "tell_model":
            return Reply(messages=(Message(role="user", content=f"Error: {value.message}"),))
        if isinstance(value, Fault):
            return Reply(error=value.message)
        parts = value if isinstance(value, list) and len(value) in (2, 3) else [value]
        text, reward, feedback = [*parts, None, None][:3]
        if _is_text(text) and _is_text(feedback) and (reward is None or finite(reward)):
            shown = () if text is None else (Message(role="user", content=text),)
            return Reply(messages=shown, reward=None if reward is None else float(reward), feedback=feedback)
        wanted = "text or None, or such a value, a finite number, and text or None"
        message = f"returned {shorten(value)}; it must return {wanted}"
        fault = self._fault("reply", Fault(message=message, misfit=True))
        return Reply(error=fault.message)


def _is_text(value: Any) -> TypeGuard[str | None]:
    return value is None or isinstance(value, str)


def _code_of(spec: FileEnvironment | ToolsEnvironment) -> Mapping[str, Any]:
    """The class or the functions, as the worker takes them."""
    if isinstance(spec, FileEnvironment):
        return {"class": spec.class_name, "arguments": dict(spec.arguments)}
    return {"functions": list(spec.functions)}
