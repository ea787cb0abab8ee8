"""Sequence files: runs one after the other, each from the weights of the one before."""

from __future__ import annotations

import re
from typing import Any, Literal

from attrs import frozen

from sdkit.language.specs.fields import NAME, TEXT_END, Range, Table, spec_field

_STAGE = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
STAGE_NAME = Range(
    "a name of letters, digits, - and _, which becomes that of a folder",
    lambda v: bool(re.fullmatch(_STAGE, v)),
    {"pattern": f"^{_STAGE}{TEXT_END}"},
)
SEVERAL = Range("two or more", lambda v: len(v) > 1, {"minProperties": 2})


@frozen(kw_only=True)
class StageSpec:
    """One stage: a run that starts from the weights of the stage before."""

    run: str | None = spec_field("run file (default: the sequence's)", default=None, path_to="file")
    overrides: Table[Any] = spec_field("keys merged onto the run file, after the sequence's own", default=Table())


@frozen(kw_only=True)
class SequenceSpec:
    """A sequence file: tasks to learn one after the other.

    All suites of all stages are evaluated at the start and after every stage.
    """

    stages: Table[StageSpec] = spec_field("the runs, in order, by name", range=SEVERAL, names=STAGE_NAME)
    run: str | None = spec_field("run file of the stages that name none", default=None, path_to="file")
    overrides: Table[Any] = spec_field("keys merged onto the run file of every stage", default=Table())
    retention: tuple[str, ...] = spec_field(
        "suites of what no stage trains on: they count neither as a task nor in its transfer", default=(), each=NAME
    )
    carry_over: tuple[Literal["optimizer", "teacher"], ...] = spec_field(
        "what goes on in the next stage besides the weights: the `optimizer` (its moments), the `teacher` (its average "
        "or copy); what is not named starts anew",
        default=(),
    )
