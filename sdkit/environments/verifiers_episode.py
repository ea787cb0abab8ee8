"""One episode of a verifiers environment as a class with `reset` and `reply`; runs in the process of a trajectory.

The environment's own control flow plays the episode, with a harness that asks the student instead of a model's server.  Only
text goes through.  Imports nothing of sdkit: verifiers may be installed for another interpreter.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
from typing import Any

import verifiers.v1 as vf
from verifiers.v1 import graph
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.runtimes import ProgramResult
from verifiers.v1.types import AssistantMessage, Message, Response, SamplingConfig, SystemMessage, UserMessage
from verifiers.v1.utils.loaders import env_config_type, load_environment, resolve_env_config

VERSION = "0.4."
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
        system, prompt = self.resolve_prompt(data)
        messages: list[Message] = [UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or [])
        if system:
            messages.insert(0, SystemMessage(content=system))
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

    @classmethod
    def _prepare(cls, id: str, config: dict[str, Any], tasks: int) -> None:
        """Load the environment and as many tasks as rows name.  Raises ValueError if it cannot be played."""
        version = importlib.metadata.version("verifiers")
        if not version.startswith(VERSION):
            raise ValueError(f"verifiers is {version}; {VERSION}x is needed")
        roles = agent_config_fields(env_config_type(id)())
        if len(roles) != 1:
            raise ValueError(f"the environment has the agents {', '.join(roles)}; only one can be the student")
        role = {"runtime": {"type": "subprocess"}, "harness": {"id": "null"}}
        settings = {"taskset": {"id": id, **config}, **dict.fromkeys(roles, role)}
        cls._environment = load_environment(resolve_env_config(settings))
        cls._tasks = list(itertools.islice(cls._environment.taskset, tasks))

    def __init__(self, id: str, config: dict[str, Any], tasks: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._asked: asyncio.Future[list[Message]] = self._loop.create_future()
        self._answer: asyncio.Future[str | None] = self._loop.create_future()
        self._episode: Any = None

    def reset(self, task: int) -> str:
        """Begin a task; returns what the student is shown before its first turn.  Raises IndexError if there is none."""
        if task >= len(self._tasks):
            raise IndexError(f"task {task} of {len(self._tasks)}")
        setup = self._environment.setup

        async def with_student(agents: Any) -> None:
            await setup(agents)
            for agent in agents._agents.values():
                agent.harness = Student(self)

        self._environment.setup = with_student
        self._running = self._loop.create_task(self._play(self._tasks[task]))
        return "\n\n".join(map(_text, self._wait() or []))

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
