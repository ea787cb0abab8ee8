"""Rollouts: who samples, and which rollouts are trained on."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.backends import AutoBackend, Backend
from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    NOT_NEGATIVE_COUNT,
    SHARE,
    SIGNED,
    SOME_TEXT,
    TEMPERATURE,
    TOP_P,
    Component,
    Scheduled,
    between,
    spec_field,
)


class BaseSampler(Component):
    """What training, the plan and the rules ask of a sampler."""

    __slots__ = ()

    @property
    def is_on_policy(self) -> bool:
        """Whether all completions are drawn from the student's own distribution."""
        return False

    @property
    def completion_column(self) -> str | None:
        """The column with completions; None if none come from the data set."""
        return None

    @property
    def uses_teacher_weights(self) -> bool:
        """Whether the teacher's weights sample."""
        return False

    @property
    def uses_teacher_prompt(self) -> bool:
        """Whether completions are sampled from the teacher's prompt."""
        return False


@frozen(kw_only=True)
class StartsWith:
    """The first turns of a demonstration, after which the student takes over and acts to the end of the trajectory.

    The demonstration is a logged chat (`{turns: …}`).  Its turns are given to the environment in the student's place, which
    answers them anew; they stand in the context, and no loss counts them.  A trajectory that ends within them is not trained
    on.  Evaluations start without them.
    """

    column: str = spec_field("column with the demonstration", default="demonstration", range=NAME)
    turns_left: Scheduled = spec_field(
        "turns at the demonstration's end that are left to the student, rounded down if a schedule is between two; a "
        "demonstration of no more turns is not used",
        range=between(1.0, 1e6, apart_from=(0,)),
    )

    def describe(self) -> str:
        """Returns in words what precedes the student's first turn."""
        return f"the turns of the column {self.column} but the last ({self.turns_left:g})"


@frozen(kw_only=True)
class StudentSamples(BaseSampler):
    """The student answers its own prompt."""

    kind: ClassVar[str] = "student"
    starts_with: StartsWith | None = spec_field(
        "turns of a demonstration that begin each trajectory (default: none)", default=None
    )

    @property
    def is_on_policy(self) -> bool:
        return True

    def describe(self) -> str:
        start = f", after {self.starts_with.describe()}" if self.starts_with else ""
        return f"student on its own prompt{start}"


@frozen(kw_only=True)
class TeacherSamples(BaseSampler):
    """Samples from the teacher's weights, from its prompt, or from both."""

    kind: ClassVar[str] = "teacher"
    description: ClassVar[str] = "{0.weights}'s weights on the {0.prompt}'s prompt"
    weights: Literal["student", "teacher"] = spec_field("whose weights sample", default="teacher")
    prompt: Literal["student", "teacher"] = spec_field("whose prompt they sample from", default="teacher")

    @property
    def uses_teacher_weights(self) -> bool:
        return self.weights == "teacher"

    @property
    def uses_teacher_prompt(self) -> bool:
        return self.prompt == "teacher"


@frozen(kw_only=True)
class DatasetSamples(BaseSampler):
    """Completions from the data set; each is ended with the chat template's end-of-turn token."""

    kind: ClassVar[str] = "dataset"
    column: str = spec_field("column with the completion", default="demonstration", range=NAME)
    drawn_by: Literal["other", "student"] = spec_field(
        "`student` if they are a log of the student's own answers, which allows estimates from them", default="other"
    )

    @property
    def is_on_policy(self) -> bool:
        return self.drawn_by == "student"

    @property
    def completion_column(self) -> str:
        return self.column

    def describe(self) -> str:
        source = "the student's logged answers" if self.is_on_policy else "the data set's own completions"
        return f"{source} (column {self.column})"


@frozen(kw_only=True)
class MixtureSamples(BaseSampler):
    """Each rollout batch comes at random either from the student or from the data set."""

    kind: ClassVar[str] = "mixture"
    student_share: Scheduled = spec_field("probability that the student samples a rollout batch", range=SHARE)
    column: str = spec_field("column with the completion", default="demonstration", range=NAME)

    @property
    def completion_column(self) -> str:
        return self.column

    def describe(self) -> str:
        other = f"otherwise the data set's completions (column {self.column})"
        return f"student on its own prompt, for {self.student_share:g} of the batches, {other}"


SampledBy = StudentSamples | TeacherSamples | DatasetSamples | MixtureSamples


class BaseFilter(Component):
    """A filter of rollouts."""

    __slots__ = ()
    needs_reward: ClassVar[bool] = True


@frozen(kw_only=True)
class NonEmpty(BaseFilter):
    """Keep completions with more than white space."""

    kind: ClassVar[str] = "non_empty"
    description: ClassVar[str] = "not empty"
    needs_reward: ClassVar[bool] = False


@frozen(kw_only=True)
class RewardAtLeast(BaseFilter):
    """Keep rollouts whose reward reaches the threshold."""

    kind: ClassVar[str] = "reward_at_least"
    description: ClassVar[str] = "the reward is at least {0.threshold:g}"
    threshold: float = spec_field("smallest reward that is kept", default=1.0, range=SIGNED)


@frozen(kw_only=True)
class NonConstantGroup(BaseFilter):
    """Keep groups whose rewards are not all equal."""

    kind: ClassVar[str] = "non_constant_group"
    description: ClassVar[str] = "the group's rewards differ"


Keep = NonEmpty | RewardAtLeast | NonConstantGroup


@frozen(kw_only=True)
class RolloutSpec:
    """Who samples, how, and on which engine."""

    sampled_by: SampledBy = spec_field("who samples", default=StudentSamples())
    completions_per_prompt: int = spec_field("completions in a group", default=1, range=AT_LEAST_ONE)
    temperature: float = spec_field("sampling temperature", default=1.0, range=TEMPERATURE)
    top_p: float = spec_field("nucleus sampling: probability mass to sample from", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "sample from the k likeliest tokens; 0 samples from all", default=0, range=NOT_NEGATIVE_COUNT
    )
    max_new_tokens: int = spec_field("longest completion, tokens", default=256, range=AT_LEAST_ONE)
    max_prompt_tokens: int | None = spec_field(
        "longest student prompt, tokens; a longer one is an error", default=None, range=AT_LEAST_ONE
    )
    stop: tuple[str, ...] = spec_field("strings that end a completion", default=(), each=SOME_TEXT)
    keep: tuple[Keep, ...] = spec_field(
        "filters that a rollout must pass to be trained on (default: none)", default=()
    )
    backend: Backend = spec_field("sampling engine", default=AutoBackend())
    max_staleness: int = spec_field(
        "how many rollout batches the sampling weights may lag behind the trained ones; above 0, servers sample the next "
        "batches during training",
        default=0,
        range=NOT_NEGATIVE_COUNT,
    )

    @property
    def starts_with(self) -> StartsWith | None:
        """The demonstration whose turns begin each trajectory, if there is one."""
        return self.sampled_by.starts_with if isinstance(self.sampled_by, StudentSamples) else None

    @property
    def data_column(self) -> str | None:
        """The column with completions, or with the turns that trajectories start with; None if there is neither."""
        return self.starts_with.column if self.starts_with else self.sampled_by.completion_column

    def describe(self) -> str:
        """Returns who samples the completions, and how."""
        who = self.sampled_by.describe()
        if isinstance(self.sampled_by, DatasetSamples):
            return who
        filters = ", kept where " + " and ".join(f.describe() for f in self.keep) if self.keep else ""
        truncation = (f", top_p {self.top_p:g}" if self.top_p < 1 else "") + (
            f", top_k {self.top_k}" if self.top_k else ""
        )
        length = f"{self.completions_per_prompt} × {self.max_new_tokens} tokens"
        return f"{who}, {length} at temperature {self.temperature:g}{truncation}{filters}"
