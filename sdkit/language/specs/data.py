"""Where rows come from, and which of their columns mean what."""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    NOT_EMPTY,
    OPTION,
    PATH,
    SEED,
    TEXT,
    Table,
    spec_field,
)

ORIGIN_HELP = "where the file can be had; with it a missing file stops the run, not `validate`, `plan` and `smoke`"


@frozen(kw_only=True)
class JsonLinesSource:
    """One JSON object a line."""

    kind: ClassVar[str] = "jsonl"
    path: str = spec_field("file, relative to the spec", range=PATH)
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class JsonSource:
    """A JSON file that holds a list of objects."""

    kind: ClassVar[str] = "json"
    path: str = spec_field("file, relative to the spec", range=PATH)
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class ParquetSource:
    """A Parquet file."""

    kind: ClassVar[str] = "parquet"
    path: str = spec_field("file, relative to the spec", range=PATH)
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class HubSource:
    """A data set of the Hugging Face hub (needs a network or a filled cache)."""

    kind: ClassVar[str] = "hub"
    path: str = spec_field("data set id", range=NAME)
    name: str | None = spec_field("configuration", default=None, range=NAME)
    split: str = spec_field("split", default="train", range=NAME)
    revision: str | None = spec_field("commit or tag", default=None, range=NAME)


@frozen(kw_only=True)
class DiskSource:
    """A data set written by `datasets.save_to_disk`."""

    kind: ClassVar[str] = "saved_dataset"
    path: str = spec_field("folder, relative to the spec", range=PATH)
    split: str | None = spec_field(
        "split, where the folder holds several", default=None, range=NAME
    )
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class ReasoningGymSource:
    """A procedural task of reasoning-gym; rows carry `question`, `answer` and `metadata`."""

    kind: ClassVar[str] = "reasoning_gym"
    task: str = spec_field("task name, such as chain_sum", range=NAME)
    size: int = spec_field("rows to generate", range=AT_LEAST_ONE)
    seed: int = spec_field("seed of the generator", default=0, range=SEED)
    options: Table[str | bool | int | float] = spec_field(
        "the task's own settings", default=Table(), each=OPTION, names=NAME
    )


@frozen(kw_only=True)
class InlineSource:
    """Rows written in the spec itself."""

    kind: ClassVar[str] = "inline"
    rows: tuple[Table[Any], ...] = spec_field("the rows", range=NOT_EMPTY)


FileSource = JsonLinesSource | JsonSource | ParquetSource | DiskSource
"""Sources that are a file or a folder of this machine."""
Source = (
    JsonLinesSource
    | JsonSource
    | ParquetSource
    | HubSource
    | DiskSource
    | ReasoningGymSource
    | InlineSource
)


@frozen(kw_only=True)
class ColumnTemplate:
    """Text built from the columns of a row: `{column}`, or `{column.key}` into a map; `{{` and `}}` are braces.

    A list of texts is inserted line by line.
    """

    template: str = spec_field("the text", range=TEXT)


@frozen(kw_only=True)
class DataSpec:
    """Where rows come from and which of their columns mean what."""

    source: Source = spec_field("the rows")
    columns: Table[str | ColumnTemplate] | None = spec_field(
        "sdkit's name → the source's column or a template; `prompt` (text or chat messages) is required, `system`, "
        "`demonstration`, `answer` and any other name may follow; evaluation data take the training data's",
        default=None,
        each=NAME,
        names=NAME,
    )
    limit: int | None = spec_field("use the first so many rows", default=None, range=AT_LEAST_ONE)
    shuffle: bool = spec_field("take the rows in an order drawn from the run's seed", default=True)
