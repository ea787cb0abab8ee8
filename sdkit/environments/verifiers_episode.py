"""One episode of a verifiers environment as a class with `reset` and `reply`; runs in the process of a trajectory.

The environment's own control flow plays the episode, with a harness that asks the student instead of a model's server.  Only
text goes through.  Imports nothing of sdkit: verifiers may be installed for another interpreter.  It shares
`sdkit/data/verifiers_tasks.py`, loaded by its path, with the program that lists the tasks.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from verifiers.v1 import graph
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.runtimes import ProgramResult
from verifiers.v1.types import AssistantMessage, Message, Response, SamplingConfig
from verifiers.v1.utils.loaders import env_config_type, load_environment, resolve_env_config


def _beside(name: str) -> Any:
    """Return a module of `sdkit/data`, which may not be imported as part of sdkit here."""
    path = Path(__file__).parents[1] / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tasks_of = _beside("verifiers_tasks")
DONE = ProgramResult(exit_code=0, stdout="", stderr="")


class Student(vf.Harness[vf.HarnessConfig]):
    """Asks the episode for each answer of the model."""

    SUPPORTS_RESUME = True
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    def __init__(self, episode: Episode) -> None:
        super().__init__(vf.HarnessConfig(id="null"))
        self._episode = episode

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> ProgramResult:
        """Commit the student's answer to the conversation; a segment without one ends the exchange."""
        if mcp_urls:
            raise NotImplementedError(f"task {data.idx} has tools, which the student cannot call yet")
        messages = tasks_of.opening_messages(data)
        turn = graph.prepare_turn(trace, messages)
        text = await self._episode.ask(messages)
        if text is not None:
            answer = AssistantMessage(content=text)
            turn.commit(Response(id="", created=0, model="student", message=answer, finish_reason="stop"))
        return DONE


class Episode:
    """Plays one task of a taskset."""

    _environment: Any = None
    _tasks: list[Any] = []
    _by_key: dict[str, Any] = {}

    @classmethod
    def _prepare(cls, id: str, config: dict[str, Any], tasks: int | None) -> None:
        """Load the environment and as many tasks as rows name.  Raises ValueError if it cannot be played."""
        tasks_of.check_version()
        roles = agent_config_fields(env_config_type(id)())
        if len(roles) != 1:
            raise ValueError(f"the environment has the agents {', '.join(roles)}; only one can be the student")
        role = {"runtime": {"type": "subprocess"}, "harness": {"id": "null"}}
        settings = {"taskset": {"id": id, **config}, **dict.fromkeys(roles, role)}
        cls._environment = load_environment(resolve_env_config(settings))
        cls._tasks = list(itertools.islice(cls._environment.taskset, tasks))
        cls._by_key = {tasks_of.key_of(task): task for task in cls._tasks}

    def __init__(self, id: str, config: dict[str, Any], tasks: int | None) -> None:
        self._loop = asyncio.new_event_loop()
        self._asked: asyncio.Future[list[Message]] = self._loop.create_future()
        self._answer: asyncio.Future[str | None] = self._loop.create_future()
        self._episode: Any = None

    def reset(self, task: int | str, shows_prompt: bool) -> str:
        """Begin a task, by its number or key; returns what the student is shown before its first turn.

        `shows_prompt`: the row shows the task's prompt.  Raises LookupError if there is no such task.
        """
        begun = self._task(task)
        setup = self._environment.setup

        async def with_student(agents: Any) -> None:
            await setup(agents)
            for agent in agents._agents.values():
                agent.harness = Student(self)

        self._environment.setup = with_student
        self._running = self._loop.create_task(self._play(begun))
        messages = self._wait() or []
        if shows_prompt:
            own = tasks_of.opening_messages(begun.data)
            if messages[: len(own)] != own:
                raise ValueError("the environment begins the task with another prompt than the task's own")
            messages = messages[len(own) :]
        return "\n\n".join(map(_text, messages))

    def reply(self, text: str) -> str | None:
        """Return the next user turn, or None at the end of the episode."""
        messages = self._tell(text)
        return None if messages is None else "\n\n".join(_text(message) for message in _last_users(messages))

    def get_reward(self) -> float | None:
        """Return the trace's reward; an episode that is not over ends first."""
        while not self._running.done():
            self._tell(None)
        (trace,) = self._episode.traces
        return float(trace.reward)

    async def ask(self, messages: list[Message]) -> str | None:
        """Return the student's answer; None: it gives no more."""
        self._asked.set_result(messages)
        return await self._answer

    def _task(self, task: int | str) -> Any:
        if isinstance(task, str):
            if task not in self._by_key:
                raise LookupError("the taskset no longer has the task of the row: it loads other tasks each time")
            return self._by_key[task]
        if task >= len(self._tasks):
            raise LookupError(f"task {task} of {len(self._tasks)}")
        return self._tasks[task]

    def _tell(self, text: str | None) -> list[Message] | None:
        answer, self._answer = self._answer, self._loop.create_future()
        self._asked = self._loop.create_future()
        answer.set_result(text)
        return self._wait()

    def _wait(self) -> list[Message] | None:
        """Return the conversation at the next turn of the student; None at the end.  Raises RuntimeError if it failed."""
        parts = [self._asked, self._running]
        self._loop.run_until_complete(asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED))
        if self._asked.done():
            return self._asked.result()
        self._running.result()
        return None

    async def _play(self, task: Any) -> None:
        async with self._environment.serving():
            context = vf.ModelContext(model="student", client=vf.EvalClientConfig(), sampling=SamplingConfig())
            self._episode = await self._environment.run_episode(task, context)
        errors = [*self._episode.errors, *(error for trace in self._episode.traces for error in trace.errors)]
        if errors:
            raise RuntimeError(f"{errors[0].type}: {errors[0].message}")


def _last_users(messages: list[Message]) -> list[Message]:
    """Return the messages after the last answer."""
    return list(itertools.takewhile(lambda message: message.role != "assistant", reversed(messages)))[::-1]


def _text(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "\n".join(getattr(part, "text", "") for part in content or [])
