"""Data sources, and the meaning of their columns."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import AT_LEAST_ONE, NAME, NOT_EMPTY, OPTION, SEED, TEXT, Table, spec_field

ORIGIN_HELP = "where to get the file; if set, a missing file stops `train` but not `validate`, `plan` and `smoke`"


@frozen(kw_only=True)
class LocalFile:
    """The keys of a source that is one file."""

    path: str = spec_field("file, relative to the spec", path_to="file")
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class JsonLinesSource(LocalFile):
    """A JSON Lines file: one object per line."""

    kind: ClassVar[str] = "jsonl"


@frozen(kw_only=True)
class JsonSource(LocalFile):
    """A JSON file with a list of objects."""

    kind: ClassVar[str] = "json"


@frozen(kw_only=True)
class CsvSource(LocalFile):
    """A CSV file whose first record names the columns; every value is text, and an empty cell is empty text."""

    kind: ClassVar[str] = "csv"
    delimiter: Literal[",", ";", "\t", "|"] = spec_field("what separates two cells", default=",")


@frozen(kw_only=True)
class ParquetSource(LocalFile):
    """A Parquet file."""

    kind: ClassVar[str] = "parquet"


@frozen(kw_only=True)
class HubSource:
    """A data set from the Hugging Face hub; needs network access or a filled cache."""

    kind: ClassVar[str] = "hub"
    path: str = spec_field("data set id", range=NAME)
    name: str | None = spec_field("configuration", default=None, range=NAME)
    split: str = spec_field("split", default="train", range=NAME)
    revision: str | None = spec_field("commit or tag", default=None, range=NAME)


@frozen(kw_only=True)
class DiskSource:
    """A data set written by `datasets.save_to_disk`."""

    kind: ClassVar[str] = "saved_dataset"
    path: str = spec_field("folder, relative to the spec", path_to="file")
    split: str | None = spec_field("split, if the folder has several", default=None, range=NAME)
    origin: str | None = spec_field(ORIGIN_HELP, default=None, range=NAME)


@frozen(kw_only=True)
class ReasoningGymSource:
    """A procedurally generated task of reasoning-gym; rows have `question`, `answer` and `metadata`."""

    kind: ClassVar[str] = "reasoning_gym"
    task: str = spec_field("task name, such as chain_sum", range=NAME)
    size: int = spec_field("rows to generate", range=AT_LEAST_ONE)
    seed: int = spec_field("seed of the generator", default=0, range=SEED)
    options: Table[str | bool | int | float] = spec_field(
        "the task's own settings", default=Table(), each=OPTION, names=NAME
    )


@frozen(kw_only=True)
class VerifiersSource:
    """The tasks of a taskset of the package verifiers (0.4).

    A row has `prompt` (a chat, if the task has a system prompt), `key`, which tells tasks apart, and the fields of the task's
    data, such as `answer`.  An environment of kind `verifiers` plays these tasks; what is left out here is taken from it.
    """

    kind: ClassVar[str] = "verifiers"
    id: str | None = spec_field(
        "name of an installed taskset (default: the one that the environment plays)", default=None, range=NAME
    )
    config: Table[str | bool | int | float] = spec_field(
        "settings of the taskset besides those of the environment, such as its split",
        default=Table(),
        each=OPTION,
        names=NAME,
    )
    python: str | None = spec_field(
        "Python interpreter that has verifiers and the taskset, relative to the spec (default: the environment's, or sdkit's own)",
        default=None,
        path_to="file",
    )


@frozen(kw_only=True)
class InlineSource:
    """Rows written in the spec itself."""

    kind: ClassVar[str] = "inline"
    rows: tuple[Table[Any], ...] = spec_field("the rows", range=NOT_EMPTY)


FileSource = JsonLinesSource | JsonSource | CsvSource | ParquetSource | DiskSource
"""Sources that are a local file or folder."""
Source = (
    JsonLinesSource
    | JsonSource
    | CsvSource
    | ParquetSource
    | HubSource
    | DiskSource
    | ReasoningGymSource
    | VerifiersSource
    | InlineSource
)


@frozen(kw_only=True)
class ColumnTemplate:
    """Text built from the columns of a row: `{column}`, or `{column.key}` into a map; `{{` and `}}` are braces.

    A list of texts is inserted line by line.
    """

    template: str = spec_field("the text", range=TEXT)


@frozen(kw_only=True)
class LastTurn:
    """The text of the assistant's turn that ends a chat, such as the answer to learn from.

    A prompt from the same column is then the chat before that turn.
    """

    last_turn: str = spec_field("the source's column: a list of messages, or JSON text of one", range=NAME)


@frozen(kw_only=True)
class ChatTurns:
    """A chat from its first assistant's turn on, as a completion of several turns: `sampled_by: dataset` trains on every
    turn of the assistant, and what stands in between is shown, not trained on.

    Messages are OpenAI's (`role`, `content`, `tool_calls`) or ShareGPT's (`from`, `value`).  A prompt from the same column is
    then the chat before these turns.  To train on the last turn alone, use `last_turn`.
    """

    turns: str = spec_field("the source's column: a list of messages, or JSON text of one", range=NAME)


@frozen(kw_only=True)
class JsonColumn:
    """The value of a column whose text is JSON, such as a chat in a CSV file."""

    json: str = spec_field("the source's column", range=NAME)


Column = str | ColumnTemplate | LastTurn | ChatTurns | JsonColumn
"""A column of the source, or what is made of one; `column.key` leads into a map, or into JSON text of one."""


@frozen(kw_only=True)
class DataSpec:
    """A source of rows and the meaning of its columns."""

    source: Source = spec_field("the rows")
    columns: Table[Column] | None = spec_field(
        "sdkit's name → the source's column (`column.key` leads into a map), a template, the last turn or all turns of a chat, "
        "or a column of JSON text; `prompt` (text or chat messages) is required; `system`, `tools` (schemas of functions, "
        "for the chat template), `demonstration`, `answer` and any other names are optional; evaluation data defaults to the "
        "training data's",
        default=None,
        each=NAME,
        names=NAME,
    )
    limit: int | None = spec_field("use only this many rows from the start", default=None, range=AT_LEAST_ONE)
    shuffle: bool = spec_field("shuffle the rows with the run's seed", default=True)
