"""Environments: what the student is shown after a turn, before it samples the next one."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    OPTION,
    SECONDS,
    SHARE,
    SIGNED,
    TEXT,
    Component,
    Table,
    between,
    spec_field,
)

SEVERAL = between(2, 1000)
TEMPLATE_TOKENS = 32
"""Tokens reserved for what a chat template writes around an observation."""
MOST_THREADS = 64
"""Threads that may wait for an environment's processes at the same time."""


@frozen(kw_only=True)
class BaseEnvironment(Component):
    """What every environment limits."""

    max_turns: int = spec_field("turns of the student at most", default=3, range=SEVERAL)
    threshold: float = spec_field(
        "smallest reward of a turn that is a success; `retry` then ends the trajectory", default=1.0, range=SIGNED
    )
    max_observation_tokens: int = spec_field(
        "tokens of a user turn's text; more are cut off", default=256, range=AT_LEAST_ONE
    )
    max_trajectory_tokens: int | None = spec_field(
        "tokens of all turns and observations (default: as many as max_turns turns can have)",
        default=None,
        range=AT_LEAST_ONE,
    )

    scheduling: Literal["lockstep", "continuous"] = spec_field(
        "when the next turn of a trajectory is sampled: with those of the others, or as soon as the environment replies",
        default="lockstep",
    )

    def longest(self, max_new_tokens: int) -> int:
        """Tokens of the longest trajectory whose turns have at most `max_new_tokens` each."""
        observation = self.max_observation_tokens + TEMPLATE_TOKENS
        longest = self.max_turns * max_new_tokens + (self.max_turns - 1) * observation
        return longest if self.max_trajectory_tokens is None else min(longest, self.max_trajectory_tokens)

    @property
    def reply_text(self) -> str:
        """What the student is shown after a turn that does not end the trajectory, in words."""
        return "what the environment replies"

    @property
    def error_limit(self) -> float:
        """Share of a batch's trajectories that may end by an error of the environment."""
        return 1.0

    @property
    def max_seconds(self) -> float | None:
        """Seconds of the environment's calls in a trajectory, after which no turn follows."""
        return None

    @property
    def calls_at_once(self) -> int:
        """How many threads may ask the environment at the same time."""
        return 1

    @property
    def opens_prompts(self) -> bool:
        """Whether the environment always appends a text to the first prompt; a user's class does if `reset` returns one."""
        return False

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        """The columns, of those mapped, that tell tasks with the same prompt apart."""
        return ()


@frozen(kw_only=True)
class RetryEnvironment(BaseEnvironment):
    """After a turn that a reward scores too low, the next user turn says so, and the student answers again."""

    kind: ClassVar[str] = "retry"
    reward: str | None = spec_field(
        "the reward that judges each turn (default: the one used in training)", default=None, range=NAME
    )
    says: str = spec_field(
        "the user turn after a failure, with {feedback} as the reward gives it",
        default="{feedback}\n\nTry again.",
        range=TEXT,
    )
    without_feedback: str = spec_field(
        "the user turn after a failure for which the reward gives no feedback",
        default="That is not right. Try again.",
        range=TEXT,
    )

    @property
    def reply_text(self) -> str:
        return f"{self.says!r}, or without feedback {self.without_feedback!r}"

    def describe(self) -> str:
        judge = "the training reward" if self.reward is None else f"`{self.reward}`"
        return f"up to {self.max_turns} turns, until {judge} reaches {self.threshold:g}"


@frozen(kw_only=True)
class HostedEnvironment(BaseEnvironment):
    """An environment with a process of its own for each trajectory."""

    call_seconds: float = spec_field("time limit of one call", default=10.0, range=SECONDS)
    trajectory_seconds: float | None = spec_field(
        "seconds of all calls of a trajectory, after which no turn follows (default: no limit)",
        default=None,
        range=SECONDS,
    )
    max_error_share: float = spec_field(
        "share of a batch's trajectories that may end by an error before the run ends", default=0.2, range=SHARE
    )

    @property
    def error_limit(self) -> float:
        return self.max_error_share

    @property
    def max_seconds(self) -> float | None:
        return self.trajectory_seconds

    @property
    def calls_at_once(self) -> int:
        return MOST_THREADS


@frozen(kw_only=True)
class ToolCalls:
    """How the student calls tools."""

    format: Literal["auto", "hermes", "qwen_xml", "llama3_json", "harmony", "text"] = spec_field(
        "how calls are written: as the chat template writes them, or as lines of text where it writes none (`auto`)",
        default="auto",
    )
    max_per_turn: int = spec_field("calls of a turn; a turn with more cannot be read", default=8, range=between(1, 64))
    unreadable: Literal["tell_model", "end"] = spec_field(
        "what follows a call that cannot be read: the reason as the next user turn, or the end of the trajectory",
        default="tell_model",
    )


@frozen(kw_only=True)
class CodeEnvironment(HostedEnvironment):
    """What environments of a user's file have in common."""

    calls: ToolCalls = spec_field("how the student calls tools, if there are any", default=ToolCalls())
    turn_seconds: float | None = spec_field(
        "time limit of all calls of a turn (default: none)", default=None, range=SECONDS
    )
    on_error: Literal["end", "tell_model", "stop_run"] = spec_field(
        "what follows a call that raises: the end of its trajectory, which is then not trained on, the error as the next "
        "observation, or the end of the run; a call that is late ends at least its trajectory",
        default="end",
    )


@frozen(kw_only=True)
class FileEnvironment(CodeEnvironment):
    """A user-defined class, with an instance for each trajectory in a process of its own.

    `reset(**columns)` begins a trajectory and may return a text that ends the first prompt.  `reply(text)` answers a turn with the next user turn, or with None to end, and may add a reward of the turn, and feedback on it for the teacher: `(text, reward)`, `(text, reward, feedback)`.  A class without `reply` has its public methods as tools, and a turn without a call ends the trajectory.  `get_reward()` gives the trajectory's reward (`kind: environment`), `close()` is called at the end; both are optional.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
    class_name: str = spec_field("name of the class", range=NAME)
    arguments: Table[str | bool | int | float] = spec_field(
        "arguments of the class, by name", default=Table(), each=OPTION, names=NAME
    )
    columns: tuple[str, ...] = spec_field("columns given to `reset` (default: all)", default=(), each=NAME)

    @property
    def reply_text(self) -> str:
        return f"what {self.class_name} replies"

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        return self.columns or mapped

    def describe(self) -> str:
        return f"{self.class_name} in {self.file}, up to {self.max_turns} turns"


@frozen(kw_only=True)
class ToolsEnvironment(CodeEnvironment):
    """Functions of a user's file as tools, in a process for each trajectory; a turn without a call ends it."""

    kind: ClassVar[str] = "tools"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
    functions: tuple[str, ...] = spec_field("names of the functions (default: all public ones)", default=(), each=NAME)

    def describe(self) -> str:
        names = ", ".join(self.functions) or "the functions"
        return f"{names} of {self.file} as tools, up to {self.max_turns} turns"
