"""Environments: what the student is shown after a turn, before it samples the next one."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from sdkit.language.specs.fields import AT_LEAST_ONE, NAME, SIGNED, TEXT, Component, between, spec_field

SEVERAL = between(2, 1000)
TEMPLATE_TOKENS = 32
"""Tokens reserved for what a chat template writes around an observation."""


@frozen(kw_only=True)
class RetryEnvironment(Component):
    """After a turn that a reward scores too low, the next user turn says so, and the student answers again."""

    kind: ClassVar[str] = "retry"
    description: ClassVar[str] = "up to {0.max_turns} turns, until {0.reward_name} reaches {0.threshold:g}"
    reward: str | None = spec_field(
        "the reward that judges each turn (default: the one used in training)", default=None, range=NAME
    )
    threshold: float = spec_field("smallest reward that ends the trajectory", default=1.0, range=SIGNED)
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
    max_turns: int = spec_field("turns of the student at most", default=3, range=SEVERAL)
    max_observation_tokens: int = spec_field(
        "tokens of a user turn's text; more are cut off", default=256, range=AT_LEAST_ONE
    )
    max_trajectory_tokens: int | None = spec_field(
        "tokens of all turns and observations (default: as many as max_turns turns can have)",
        default=None,
        range=AT_LEAST_ONE,
    )

    @property
    def reward_name(self) -> str:
        return "the training reward" if self.reward is None else f"`{self.reward}`"

    def longest(self, max_new_tokens: int) -> int:
        """Tokens of the longest trajectory whose turns have at most `max_new_tokens` each."""
        observation = self.max_observation_tokens + TEMPLATE_TOKENS
        longest = self.max_turns * max_new_tokens + (self.max_turns - 1) * observation
        return longest if self.max_trajectory_tokens is None else min(longest, self.max_trajectory_tokens)


Environment = RetryEnvironment
