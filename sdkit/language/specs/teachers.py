"""The weights a teacher can have."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE_COUNT,
    SECONDS,
    SHARE,
    Component,
    Scheduled,
    Table,
    spec_field,
)


class BaseWeights(Component):
    """What the plan and the rules ask of a teacher's weights."""

    __slots__ = ()
    is_stored: ClassVar[bool] = True
    """Whether they take memory of their own in this process."""
    is_other_model: ClassVar[bool] = False
    """Whether they are another model than the student."""
    follows_student: ClassVar[bool] = False
    """Whether they are updated from the student during the run, through a float32 shadow."""
    cannot_sample: ClassVar[str | None] = None
    """Why they cannot sample completions, if they cannot."""

    def describe_place(self, lora: bool) -> str:
        """Returns where they are stored besides the student's, if they are; `lora`: whether the student has an adapter."""
        return ""


@frozen(kw_only=True)
class StudentWeights(BaseWeights):
    """The live student itself."""

    kind: ClassVar[str] = "student"
    description: ClassVar[str] = "the live student"
    is_stored: ClassVar[bool] = False


@frozen(kw_only=True)
class FrozenWeights(BaseWeights):
    """The weights the run started from."""

    kind: ClassVar[str] = "frozen"
    description: ClassVar[str] = "the frozen start model"

    def describe_place(self, lora: bool) -> str:
        return " (the student with its adapter off)" if lora else " (a second copy of the model)"


class UpdatedWeights(BaseWeights):
    """Weights that are updated from the student's."""

    __slots__ = ()
    follows_student: ClassVar[bool] = True

    def describe_place(self, lora: bool) -> str:
        return " (a second adapter, float32 shadow)" if lora else " (a second copy, float32 shadow)"


@frozen(kw_only=True)
class EmaWeights(UpdatedWeights):
    """An exponential moving average of the student, kept in float32: teacher += update_rate × (student − teacher)."""

    kind: ClassVar[str] = "ema"
    update_rate: Scheduled = spec_field("share of the student mixed in per update", range=SHARE)
    every: Literal["optimizer_step", "rollout_batch"] = spec_field(
        "when the average is updated: after each optimizer step or each rollout batch", default="optimizer_step"
    )

    def describe(self) -> str:
        often = self.every.replace("_", " ")
        return f"average of the student (update_rate {self.update_rate:g} per {often})"


@frozen(kw_only=True)
class CopyWeights(UpdatedWeights):
    """A copy of the student, refreshed every so many optimizer steps."""

    kind: ClassVar[str] = "copy"
    description: ClassVar[str] = "copy of the student, renewed every {0.every} optimizer steps"
    every: int = spec_field("optimizer steps between copies", range=AT_LEAST_ONE)


@frozen(kw_only=True)
class ExternalWeights(BaseWeights):
    """Another model with the student's vocabulary.  It reads the same token ids, and so uses the student's chat template."""

    kind: ClassVar[str] = "external"
    description: ClassVar[str] = "the model {0.path}"
    is_other_model: ClassVar[bool] = True
    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", path_to="model")
    revision: str | None = spec_field("commit or tag of a hub model", default=None, range=NAME)
    dtype: Literal["float32", "bfloat16"] = spec_field("precision of its forward pass", default="bfloat16")

    def describe_place(self, lora: bool) -> str:
        return f" (a second model, {self.dtype})"


@frozen(kw_only=True)
class ServedWeights(BaseWeights):
    """A model with the student's vocabulary behind vLLM's HTTP API.

    It reads the same token ids as the student and returns log-probabilities of its likeliest tokens and of the sampled
    one only, at temperature 1.  Start the server with `--max-logprobs` at least as large as the largest k.
    """

    kind: ClassVar[str] = "served"
    description: ClassVar[str] = "the model {0.model} served at {0.url}"
    is_stored: ClassVar[bool] = False
    is_other_model: ClassVar[bool] = True
    cannot_sample: ClassVar[str | None] = "a served teacher is asked about completions and does not sample"
    url: str = spec_field("address of the server, such as http://127.0.0.1:8000", range=NAME)
    model: str = spec_field("name under which the server serves the model", range=NAME)
    tokenizer: str | None = spec_field(
        "tokenizer to compare with the student's: `bundled:NAME`, a local folder, or a hub id; the server's text for each "
        "token id is compared in any case",
        default=None,
        path_to="model",
    )
    key_from: str | None = spec_field(
        "environment variable with the server's API key; the key itself is never in a spec", default=None, range=NAME
    )
    allow_remote: bool = spec_field(
        "allow a server on another machine, which receives prompts and completions", default=False
    )
    requests_at_once: int = spec_field("concurrent requests, one sequence each", default=8, range=AT_LEAST_ONE)
    request_seconds: float = spec_field("time limit of one request", default=120.0, range=SECONDS)
    retries: int = spec_field("retries if the server is unreachable or busy", default=6, range=NOT_NEGATIVE_COUNT)
    deadline_seconds: float = spec_field("time limit of one sequence, retries included", default=600.0, range=SECONDS)

    def describe_place(self, lora: bool) -> str:
        count = self.requests_at_once
        return f" (no weights here, {count} request{'s' * (count != 1)} at once)"


OneTeacher = StudentWeights | FrozenWeights | EmaWeights | CopyWeights | ExternalWeights | ServedWeights


@frozen(kw_only=True)
class RoutedWeights(BaseWeights):
    """A different teacher for each value of a data column."""

    kind: ClassVar[str] = "routed"
    cannot_sample: ClassVar[str | None] = "a routed teacher is several models and does not sample"
    by: str = spec_field("sdkit's name of the column", range=NAME)
    routes: Table[OneTeacher] = spec_field("weights for each value of the column", range=NOT_EMPTY, names=NAME)

    def describe(self) -> str:
        teachers = "; ".join(f"{name}: {weights.describe()}" for name, weights in self.routes.items())
        return f"by column {self.by} ({teachers})"

    def describe_place(self, lora: bool) -> str:
        count = len({weights for weights in self.routes.values() if weights.is_stored})
        return f" ({count} set{'s' * (count != 1)} of weights beside the student's)"


TeacherWeights = OneTeacher | RoutedWeights
