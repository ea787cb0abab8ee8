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

    def longest(self, max_new_tokens: int) -> int:
        """Tokens of the longest trajectory whose turns have at most `max_new_tokens` each."""
        observation = self.max_observation_tokens + TEMPLATE_TOKENS
        longest = self.max_turns * max_new_tokens + (self.max_turns - 1) * observation
        return longest if self.max_trajectory_tokens is None else min(longest, self.max_trajectory_tokens)

    @property
    def observation(self) -> str:
        """What the student is shown after a turn that does not end the trajectory, in words."""
        return "what the environment replies"

    @property
    def error_limit(self) -> float:
        """Share of a batch's trajectories that may end by an error of the environment."""
        return 1.0

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
    def observation(self) -> str:
        return f"{self.says!r}, or without feedback {self.without_feedback!r}"

    def describe(self) -> str:
        judge = "the training reward" if self.reward is None else f"`{self.reward}`"
        return f"up to {self.max_turns} turns, until {judge} reaches {self.threshold:g}"


@frozen(kw_only=True)
class FileEnvironment(BaseEnvironment):
    """A user-defined class, with an instance for each trajectory in a process of its own.

    `reset(**columns)` begins a trajectory, `reply(text)` answers a turn with the next user turn, or with None to end, and may
    add a reward of the turn: `(text, reward)`.  Both are required.  `get_reward()` gives the trajectory's reward (`kind: environment`), `close()` is called at the end.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
    class_name: str = spec_field("name of the class", range=NAME)
    arguments: Table[str | bool | int | float] = spec_field(
        "arguments of the class, by name", default=Table(), each=OPTION, names=NAME
    )
    columns: tuple[str, ...] = spec_field("columns given to `reset` (default: all)", default=(), each=NAME)
    call_seconds: float = spec_field("time limit of one call", default=10.0, range=SECONDS)
    on_error: Literal["end", "stop_run"] = spec_field(
        "what a call that fails or is late ends: its trajectory, which is then not trained on, or the run",
        default="end",
    )
    max_error_share: float = spec_field(
        "share of a batch's trajectories that may end by an error before the run ends", default=0.2, range=SHARE
    )

    @property
    def observation(self) -> str:
        return f"what {self.class_name} replies"

    @property
    def error_limit(self) -> float:
        return self.max_error_share

    def task_columns(self, mapped: Collection[str]) -> Collection[str]:
        return self.columns or mapped

    def describe(self) -> str:
        return f"{self.class_name} in {self.file}, up to {self.max_turns} turns"


Environment = RetryEnvironment | FileEnvironment
