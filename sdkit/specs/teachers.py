"""What a teacher can be: which weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.specs.fields import AT_LEAST_ONE, NOT_EMPTY, SHARE, Schedule, Table, spec_field


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
    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", range=NOT_EMPTY)
    revision: str | None = spec_field("commit or tag of a hub model", default=None)
    dtype: Literal["float32", "bfloat16"] = spec_field(
        "precision of its forward pass", default="bfloat16"
    )


OneTeacher = StudentWeights | FrozenWeights | EmaWeights | CopyWeights | ExternalWeights


@frozen(kw_only=True)
class RoutedWeights:
    """Each row's teacher by a column of the data."""

    kind: ClassVar[str] = "routed"
    by: str = spec_field("the column, by sdkit's name", range=NOT_EMPTY)
    routes: Table[OneTeacher] = spec_field(
        "the weights for each value of the column", range=NOT_EMPTY
    )


TeacherWeights = OneTeacher | RoutedWeights
