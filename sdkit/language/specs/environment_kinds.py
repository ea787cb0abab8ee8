"""Environments of other packages and servers, environments by row, and the union of every kind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar, Literal, TypeVar

from attrs import frozen

from sdkit.language.specs.environments import (
    BaseEnvironment,
    FileEnvironment,
    HostedEnvironment,
    RetryEnvironment,
    ToolsEnvironment,
)
from sdkit.language.specs.fields import AT_LEAST_ONE, NAME, NOT_EMPTY, OPTION, TEXT, Component, Table, spec_field
from sdkit.language.specs.scores import Extract, WholeText

T = TypeVar("T", bound=BaseEnvironment)


@frozen(kw_only=True)
class EpisodeEnvironment(HostedEnvironment):
    """An environment of another package or a server; its first observation is appended to the prompt."""

    on_error: Literal["end", "stop_run"] = spec_field(
        "what a call that fails or is late ends: its trajectory, which is then not trained on, or the run",
        default="end",
    )

    @property
    def opens_prompts(self) -> bool:
        return True


@frozen(kw_only=True)
class SteppedEnvironment(EpisodeEnvironment):
    """An environment that takes an action and gives an observation, both written as text."""

    columns: tuple[str, ...] = spec_field("columns given to its reset (default: none)", default=(), each=NAME)
    seed_column: str | None = spec_field(
        "column with the seed of its reset (default: drawn, one for all completions of a prompt)",
        default=None,
        range=NAME,
    )
    observation: str = spec_field("text of an observation, a template", default="{observation}", range=TEXT)
    extract: Extract = spec_field("how to find the action in the completion", default=WholeText())
    unparsable: str = spec_field(
        "user turn after a completion that has no valid action, and so is no step; {actions} describes them",
        default="That is not an action. Answer with {actions}.",
        range=TEXT,
    )
    trajectory_reward: Literal["sum", "last"] = spec_field(
        "what a reward of kind `environment` is: the sum of the steps' rewards, or the last one", default="sum"
    )

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        return [*self.columns, *filter(None, [self.seed_column])]


@frozen(kw_only=True)
class GymnasiumEnvironment(SteppedEnvironment):
    """A gymnasium environment, one for each trajectory in a process of its own; needs the package gymnasium.

    The extracted text is the action: a number for a Discrete space, the text itself for a Text space, JSON for others.
    Each step's reward is the reward of its turn.  `observation` may contain `{observation}`, `{observation.key}` for a
    Dict space, and `{render}`, what `render()` gives (arguments: {render_mode: ansi}), without colours.
    """

    kind: ClassVar[str] = "gymnasium"
    id: str = spec_field("registered id, such as FrozenLake-v1", range=NAME)
    file: str | None = spec_field(
        "Python file that registers the id, relative to the spec", default=None, path_to="file"
    )
    arguments: Table[str | bool | int | float] = spec_field(
        "arguments of gymnasium.make, by name", default=Table(), each=OPTION, names=NAME
    )
    choices: tuple[str, ...] = spec_field(
        "names of the actions of a Discrete space, in order; the last one in the extracted text is the action",
        default=(),
        each=NAME,
    )

    def describe(self) -> str:
        return f"gymnasium {self.id}, up to {self.max_turns} turns"


@frozen(kw_only=True)
class OpenEnvEnvironment(SteppedEnvironment):
    """An environment on an OpenEnv server, a session (web socket) for each trajectory; needs the package websockets.

    The extracted text is the action if the server's actions have one required field, a text; otherwise it is JSON.
    Observations are JSON, and `{observation.key}` is one of their fields.  The server must allow as many sessions as a
    batch has completions (max_concurrent_envs).
    """

    kind: ClassVar[str] = "openenv"
    url: str = spec_field("address of the server, such as http://127.0.0.1:8000", range=NAME)
    allow_remote: bool = spec_field("allow a server on another machine, which receives completions", default=False)
    action_field: str | None = spec_field(
        "the field of an action that gets the text (default: the only required one)", default=None, range=NAME
    )

    def describe(self) -> str:
        return f"OpenEnv at {self.url}, up to {self.max_turns} turns"


@frozen(kw_only=True)
class VerifiersEnvironment(EpisodeEnvironment):
    """An environment of the package verifiers (0.4), which plays a task of its taskset with the student.

    Its tasks may be the rows (`data.source: verifiers`).  Of other rows, a column has the number of the task, and the task's
    prompt is appended to the row's.  The environment must have one agent and no tools; methods that stop a trace
    (`@stop`) are not asked.  The trace's reward is the reward of the trajectory; turns have none.
    """

    kind: ClassVar[str] = "verifiers"
    id: str = spec_field("name of an installed taskset", range=NAME)
    config: Table[str | bool | int | float] = spec_field(
        "settings of the taskset, by name", default=Table(), each=OPTION, names=NAME
    )
    task_column: str = spec_field(
        "column with the key of a row's task, or in rows of another source its number, from 0",
        default="task",
        range=NAME,
    )
    tasks: int = spec_field(
        "tasks to load at most, where the rows are of another source", default=1000, range=AT_LEAST_ONE
    )
    python: str | None = spec_field(
        "Python interpreter that has verifiers and the taskset, relative to the spec (default: sdkit's own)",
        default=None,
        path_to="file",
    )

    @property
    def opens_prompts(self) -> bool:
        return True

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        return [self.task_column]

    def describe(self) -> str:
        return f"verifiers {self.id}, up to {self.max_turns} turns"


OneEnvironment = (
    RetryEnvironment
    | FileEnvironment
    | ToolsEnvironment
    | GymnasiumEnvironment
    | OpenEnvEnvironment
    | VerifiersEnvironment
)


@frozen(kw_only=True)
class RoutedEnvironment(Component):
    """A different environment for each value of a data column, with limits and tools of its own."""

    kind: ClassVar[str] = "routed"
    by: str = spec_field("sdkit's name of the column", range=NAME)
    routes: Table[OneEnvironment] = spec_field("environment for each value of the column", range=NOT_EMPTY, names=NAME)

    @property
    def opens_prompts(self) -> bool:
        """Whether a route always appends a text to the first prompt."""
        return any(route.opens_prompts for route in self.routes.values())

    @property
    def max_turns(self) -> int:
        """The most turns that a route allows."""
        return max(route.max_turns for route in self.routes.values())

    @property
    def max_observation_tokens(self) -> int:
        """The most tokens of an observation that a route allows."""
        return max(route.max_observation_tokens for route in self.routes.values())

    @property
    def scheduling(self) -> str:
        """`continuous` if any route asks for it: turns of all routes are sampled by one engine."""
        return max((route.scheduling for route in self.routes.values()), key=["lockstep", "continuous"].index)

    @property
    def error_limit(self) -> float:
        """The largest share of a batch's trajectories that may end by an error in any route."""
        return max(route.error_limit for route in self.routes.values())

    @property
    def calls_at_once(self) -> int:
        """How many threads may ask the routes at the same time."""
        return min(route.calls_at_once for route in self.routes.values())

    @property
    def reply_text(self) -> str:
        """What the student is shown after a turn that does not end the trajectory, in words."""
        return "what the environment of the row replies"

    def longest(self, max_new_tokens: int) -> int:
        """Tokens of the longest trajectory of any route."""
        return max(route.longest(max_new_tokens) for route in self.routes.values())

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        """The columns, of those mapped, that tell tasks with the same prompt apart."""
        return {self.by, *(name for route in self.routes.values() for name in route.task_columns(mapped))}

    def describe(self) -> str:
        routes = "; ".join(f"{name}: {route.describe()}" for name, route in self.routes.items())
        return f"by column {self.by} ({routes})"


Environment = OneEnvironment | RoutedEnvironment


def environments_of(spec: Environment | None, *kinds: type[T]) -> Iterator[tuple[tuple[str, ...], T]]:
    """Yields the environments of these classes in a run file, each with its path; `spec` may be a routed one."""
    if isinstance(spec, RoutedEnvironment):
        placed = [(("environment", "routes", name), route) for name, route in spec.routes.items()]
    else:
        placed = [(("environment",), spec)]
    for path, environment in placed:
        if isinstance(environment, kinds):
            yield path, environment
