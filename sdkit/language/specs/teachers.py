"""What a teacher can be: which weights."""

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
    Schedule,
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
    """A running average of the student, kept in float32: teacher += update_rate × (student − teacher)."""

    kind: ClassVar[str] = "ema"
    update_rate: float | Schedule = spec_field("share of the student mixed in", range=SHARE)
    every: Literal["optimizer_step", "rollout_batch"] = spec_field(
        "what an update follows", default="optimizer_step"
    )


@frozen(kw_only=True)
class CopyWeights:
    """A copy of the student, renewed now and then."""

    kind: ClassVar[str] = "copy"
    every: int = spec_field("optimizer steps between copies", range=AT_LEAST_ONE)


@frozen(kw_only=True)
class ExternalWeights:
    """Another model with the student's vocabulary.  It reads the same token ids, so the student's chat template."""

    kind: ClassVar[str] = "external"
    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", range=PATH)
    revision: str | None = spec_field("commit or tag of a hub model", default=None, range=NAME)
    dtype: Literal["float32", "bfloat16"] = spec_field(
        "precision of its forward pass", default="bfloat16"
    )


@frozen(kw_only=True)
class ServedWeights:
    """A model behind vLLM's HTTP API, with the student's vocabulary.

    It tells of its likeliest tokens and of the sampled one alone, at temperature 1, and reads the same token ids as the
    student.  Start the server with `--max-logprobs` of at least the largest k.
    """

    kind: ClassVar[str] = "served"
    url: str = spec_field("where the server listens, such as http://127.0.0.1:8000", range=NAME)
    model: str = spec_field("the name that it serves the model under", range=NAME)
    tokenizer: str | None = spec_field(
        "`bundled:NAME`, a local folder, or a hub id, to be compared with the student's; how the server spells every id "
        "is compared in any case",
        default=None,
        range=PATH,
    )
    key_from: str | None = spec_field(
        "environment variable that holds the server's key; the key itself stands in no spec",
        default=None,
        range=NAME,
    )
    allow_remote: bool = spec_field(
        "let the server be another machine: prompts and completions are sent there", default=False
    )
    requests_at_once: int = spec_field("sequences in flight", default=8, range=AT_LEAST_ONE)
    request_seconds: float = spec_field(
        "longest time for one request", default=120.0, range=SECONDS
    )
    retries: int = spec_field(
        "further attempts where a server cannot be reached or is busy",
        default=6,
        range=NOT_NEGATIVE_COUNT,
    )
    deadline_seconds: float = spec_field(
        "longest time for one sequence, further attempts included", default=600.0, range=SECONDS
    )


OneTeacher = (
    StudentWeights | FrozenWeights | EmaWeights | CopyWeights | ExternalWeights | ServedWeights
)


@frozen(kw_only=True)
class RoutedWeights:
    """Each row's teacher by a column of the data."""

    kind: ClassVar[str] = "routed"
    by: str = spec_field("the column, by sdkit's name", range=NAME)
    routes: Table[OneTeacher] = spec_field(
        "the weights for each value of the column", range=NOT_EMPTY, names=NAME
    )


TeacherWeights = OneTeacher | RoutedWeights
