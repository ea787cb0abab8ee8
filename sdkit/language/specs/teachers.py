"""The weights a teacher can have."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE_COUNT,
    PATH,
    SECONDS,
    SHARE,
    Scheduled,
    Table,
    spec_field,
)


@frozen(kw_only=True)
class StudentWeights:
    """The live student itself."""

    kind: ClassVar[str] = "student"


@frozen(kw_only=True)
class FrozenWeights:
    """The weights the run started from."""

    kind: ClassVar[str] = "frozen"


@frozen(kw_only=True)
class EmaWeights:
    """An exponential moving average of the student, kept in float32: teacher += update_rate × (student − teacher)."""

    kind: ClassVar[str] = "ema"
    update_rate: Scheduled = spec_field("share of the student mixed in per update", range=SHARE)
    every: Literal["optimizer_step", "rollout_batch"] = spec_field(
        "when the average is updated: after each optimizer step or each rollout batch", default="optimizer_step"
    )


@frozen(kw_only=True)
class CopyWeights:
    """A copy of the student, refreshed every so many optimizer steps."""

    kind: ClassVar[str] = "copy"
    every: int = spec_field("optimizer steps between copies", range=AT_LEAST_ONE)


@frozen(kw_only=True)
class ExternalWeights:
    """Another model with the student's vocabulary.  It reads the same token ids, and so uses the student's chat template."""

    kind: ClassVar[str] = "external"
    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", range=PATH)
    revision: str | None = spec_field("commit or tag of a hub model", default=None, range=NAME)
    dtype: Literal["float32", "bfloat16"] = spec_field("precision of its forward pass", default="bfloat16")


@frozen(kw_only=True)
class ServedWeights:
    """A model with the student's vocabulary behind vLLM's HTTP API.

    It reads the same token ids as the student and returns log-probabilities of its likeliest tokens and of the sampled
    one only, at temperature 1.  Start the server with `--max-logprobs` at least as large as the largest k.
    """

    kind: ClassVar[str] = "served"
    url: str = spec_field("address of the server, such as http://127.0.0.1:8000", range=NAME)
    model: str = spec_field("name under which the server serves the model", range=NAME)
    tokenizer: str | None = spec_field(
        "tokenizer to compare with the student's: `bundled:NAME`, a local folder, or a hub id; the server's text for each "
        "token id is compared in any case",
        default=None,
        range=PATH,
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


OneTeacher = StudentWeights | FrozenWeights | EmaWeights | CopyWeights | ExternalWeights | ServedWeights


@frozen(kw_only=True)
class RoutedWeights:
    """A different teacher for each value of a data column."""

    kind: ClassVar[str] = "routed"
    by: str = spec_field("sdkit's name of the column", range=NAME)
    routes: Table[OneTeacher] = spec_field("weights for each value of the column", range=NOT_EMPTY, names=NAME)


TeacherWeights = OneTeacher | RoutedWeights
