"""Rows: from a source, through the columns, to chat prompts.  Knows nothing of tokens, teachers or rewards.

Messages name a line of a JSON Lines file as `file:line`, counted from 1, and a row of any other source by its index,
counted from 0, which is `Row.index`.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, assert_never

from sdkit.batches import Message, Row
from sdkit.problems import BadData, BadEnvironment, first_of, listed, nearest, shorten
from sdkit.seeds import derive
from sdkit.specs import (
    ColumnTemplate,
    DataSpec,
    DiskSource,
    HubSource,
    InlineSource,
    JsonLinesSource,
    JsonSource,
    ParquetSource,
    ReasoningGymSource,
    Source,
    Table,
)
from sdkit.templates import Field, Template, TemplateError, fields, fill, parse

Columns = Mapping[str, str | ColumnTemplate]
Raw = Mapping[str, Any]


class _Fault(Exception):
    """What is wrong with one row."""


Found = list[tuple[str, Raw | _Fault]]
"""What was read: where each row stands, and the row, or why it could not be read."""


# ── rows ──────────────────────────────────────────────────────────────────────────────────────


def load_rows(
    data: DataSpec,
    base: Path,
    fallback_columns: Table[str | ColumnTemplate] | None = None,
    needed: Collection[str] = (),
) -> list[Row]:
    """The rows of a source with sdkit's names for their columns, and their prompts as chat.

    `base` is the folder that relative paths start from, `fallback_columns` stand in where the data state none, and
    the columns in `needed` must not be empty.  A column template with a null in it gives null.  Raises BadData that
    names every fault of every row at once, and BadEnvironment where a package or the hub is out of reach.
    """
    columns = data.columns if data.columns is not None else fallback_columns
    if columns is None or "prompt" not in columns:
        raise BadData("the data have no column for 'prompt'", hint="write columns: {prompt: …}")
    for name in needed:
        if name not in columns:
            raise BadData(
                f"the run needs a column '{name}', but columns name only {listed(columns)}"
            )
    name, found = _name(data.source), _read(data.source, base, data.limit)
    if not found:
        raise BadData(f"{name} has no rows")
    templates = {key: _template(key, column) for key, column in columns.items()}
    present, faults = _present(templates, found, name)
    rows = []
    for index, (place, raw) in enumerate(found):
        try:
            rows.append(_row(index, raw, present, needed))
        except _Fault as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        _give_up(faults)
    return rows


def _row(
    index: int, raw: Raw | _Fault, columns: Mapping[str, str | Template], needed: Iterable[str]
) -> Row:
    if isinstance(raw, _Fault):
        raise raw
    mapped = {name: _value(column, raw) for name, column in columns.items()}
    empty = [name for name in needed if name in mapped and _is_empty(mapped[name])]
    if empty:
        raise _Fault(f"{listed(empty)} must not be empty")
    messages = _messages(mapped) if "prompt" in mapped else ()
    return Row(index=index, messages=messages, columns=mapped, raw=raw)


def _give_up(faults: Sequence[str]) -> NoReturn:
    raise BadData(first_of(faults))


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 of the messages and columns of the rows, in order; the same in every process."""
    digest = hashlib.sha256()
    for row in rows:
        content = _plain({"messages": row.messages, "columns": row.columns})
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def drop_overlap(train: Sequence[Row], held_out: Iterable[Row]) -> tuple[list[Row], int]:
    """The training rows whose prompt is not held out, and how many were dropped.

    Case, white space, Unicode form and the system message make no difference.
    """
    taken = {_normalised(row) for row in held_out}
    kept = [row for row in train if _normalised(row) not in taken]
    return kept, len(train) - len(kept)


def _normalised(row: Row) -> tuple[str, ...]:
    texts = (m["content"] for m in row.messages if m["role"] != "system")
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def positions(start: int, n: int, rows: int, seed: int, shuffle: bool) -> list[int]:
    """Indices of the rows at places start .. start + n of an endless walk, epoch after epoch.

    Each epoch visits every row once, in an order of its own drawn from `seed`.  A pure function, so that resuming
    needs the place alone.
    """
    walk = (divmod(place, rows) for place in range(start, start + n))
    return [_order(rows, seed, epoch)[i] if shuffle else i for epoch, i in walk]


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(derive(seed, "data order", epoch)).shuffle(order)
    return tuple(order)


# ── columns ───────────────────────────────────────────────────────────────────────────────────


def _template(name: str, column: str | ColumnTemplate) -> str | Template:
    if isinstance(column, str):
        return column
    try:
        return parse(column.template)
    except TemplateError as error:
        raise BadData(f"the template of column '{name}': {error}") from error


def _sources(column: str | Template) -> list[str]:
    """The columns of the source that a column is made of."""
    return [column] if isinstance(column, str) else [field.name for field in fields(column)]


def _present(
    columns: Mapping[str, str | Template], found: Found, name: str
) -> tuple[dict[str, str | Template], list[str]]:
    """The columns that some row has, and a fault for each that none has."""
    rows = [raw for _, raw in found if isinstance(raw, Mapping)]
    available = list(dict.fromkeys(key for raw in rows for key in raw))
    wanted = dict.fromkeys(key for column in columns.values() for key in _sources(column))
    absent = [key for key in wanted if rows and key not in available]
    faults = []
    for key in absent:
        like = nearest(key, available)
        meant = f"; did you mean '{like}'?" if like else ""
        faults.append(f"{name} has no column '{key}'{meant} (it has {listed(available)})")
    present = {n: c for n, c in columns.items() if not set(absent).intersection(_sources(c))}
    return present, faults


def _value(column: str | Template, raw: Raw) -> Any:
    if isinstance(column, str):
        return _walk(raw, Field(column))
    values = {field: _walk(raw, field) for field in fields(column)}
    if None in values.values():
        return None
    return fill(column, lambda field: str(values[field]))


def _walk(raw: Raw, field: Field) -> Any:
    value: Any = raw
    for key in (field.name, *field.path):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            raise _Fault(f"no '{field}' (write null where a row has none)")
        value = value[key]
    return value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


# ── messages ──────────────────────────────────────────────────────────────────────────────────


def _messages(mapped: Raw) -> tuple[Message, ...]:
    prompt, system = mapped["prompt"], mapped.get("system")
    if _is_empty(prompt) or prompt in ([], ()):
        raise _Fault("the prompt is empty")
    if isinstance(prompt, str):
        chat: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    elif isinstance(prompt, list | tuple):
        chat = _chat(prompt)
    else:
        raise _Fault(f"the prompt is {_what(prompt)}, not text or a list of messages")
    if system is None or system == "":
        return chat
    if not isinstance(system, str):
        raise _Fault(f"'system' is {_what(system)}, not text")
    if chat[0]["role"] == "system":
        raise _Fault("the prompt brings a system message of its own, and 'system' is another")
    return ({"role": "system", "content": system}, *chat)


def _chat(prompt: Sequence[Any]) -> tuple[Message, ...]:
    for i, message in enumerate(prompt):
        given = message if isinstance(message, Mapping) else {}
        if {key for key, value in given.items() if value is not None} != {"role", "content"}:
            raise _Fault(f"message {i} of the prompt is not {{role: …, content: …}}")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise _Fault(
                f"message {i} of the prompt has the role {shorten(role)}, "
                "not 'system', 'user' or 'assistant'"
            )
        if role == "system" and i:
            raise _Fault(f"message {i} of the prompt is a system message, but not the first")
        if not isinstance(content, str):
            raise _Fault(f"message {i} of the prompt holds {_what(content)}, not text")
    if prompt[-1]["role"] != "user":
        raise _Fault(f"the prompt ends with a message of role '{prompt[-1]['role']}', not 'user'")
    if _is_empty(prompt[-1]["content"]):
        raise _Fault("the last message of the prompt is empty")
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)


def _what(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return shorten(value)
    kinds = {str: "text", list: "a list", tuple: "a list"}
    return "a map" if isinstance(value, Mapping) else kinds.get(type(value), "something else")


# ── sources ───────────────────────────────────────────────────────────────────────────────────


def _name(source: Source) -> str:
    """What messages call the source."""
    match source:
        case ReasoningGymSource():
            return f"reasoning-gym's {source.task}"
        case InlineSource():
            return "data.source.rows"
        case _:
            return source.path


def _read(source: Source, base: Path, limit: int | None) -> Found:
    """The first `limit` rows of any source."""
    name = _name(source)
    match source:
        case JsonLinesSource():
            return _json_lines(_bytes(base / source.path, name), name, limit)
        case JsonSource():
            rows = _json(_bytes(base / source.path, name), name)
        case ParquetSource():
            rows = _library(lambda: _parquet(base / source.path, limit), name)
        case HubSource():
            rows = _library(lambda: _hub(source, limit), name)
        case DiskSource():
            rows = _library(lambda: _disk(source, base, limit), name)
        case ReasoningGymSource():
            rows = _reasoning_gym(source, limit)
        case InlineSource():
            rows = source.rows
        case _:
            assert_never(source)
    return [(f"{name} row {i}", _map(row)) for i, row in enumerate(islice(rows, limit))]


def _map(value: Any) -> Raw | _Fault:
    return value if isinstance(value, Mapping) else _Fault(f"{_what(value)}, not a map")


def _bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadData(f"cannot read {name}: {(error.strerror or str(error)).lower()}") from error


def _json_lines(content: bytes, name: str, limit: int | None) -> Found:
    if content.lstrip()[:1] == b"[":
        raise BadData(f"{name} is a JSON list, not JSON Lines", hint="use kind: json")
    # Not splitlines(): JSON text may hold U+2028 and the like, which end a line in Python only.
    texts = enumerate(content.split(b"\n"), 1)
    filled = ((number, text) for number, text in texts if text.strip())
    return [(f"{name}:{number}", _json_line(text)) for number, text in islice(filled, limit)]


def _json_line(text: bytes) -> Raw | _Fault:
    try:
        return _map(json.loads(text.decode()))
    except json.JSONDecodeError as error:
        return _Fault(f"not JSON: {error.msg.lower()} at column {error.colno}")
    except UnicodeDecodeError:
        return _Fault("not UTF-8")


def _json(content: bytes, name: str) -> list[Any]:
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise BadData(f"{name} is not UTF-8") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and content.lstrip()[:1] == b"{"
        raise BadData(
            f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg.lower()}",
            hint="this looks like JSON Lines: use kind: jsonl" if lines else None,
        ) from error
    if not isinstance(value, list):
        one = "use kind: jsonl where each line is an object" if isinstance(value, dict) else None
        raise BadData(f"{name} holds {_what(value)}, not a list of objects", hint=one)
    return value


def _library(read: Callable[[], Iterable[Any]], name: str) -> Iterable[Any]:
    """The rows that a library reads, its errors as ours."""
    try:
        return read()
    except (BadData, BadEnvironment):
        raise
    except ConnectionError as error:
        raise BadEnvironment(
            f"cannot reach the hub for {name}: {error}",
            hint="fill the cache where there is a network, or save the data to a file",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadData(f"cannot read {name}: {error}") from error


def _parquet(path: Path, limit: int | None) -> Iterable[Any]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()


def _hub(source: HubSource, limit: int | None) -> Iterable[Any]:
    import datasets

    held = datasets.load_dataset(
        source.path, source.name, split=source.split, revision=source.revision
    )
    return _first(held, limit)


def _disk(source: DiskSource, base: Path, limit: int | None) -> Iterable[Any]:
    import datasets

    held: Any = datasets.load_from_disk(str(base / source.path))
    splits = list(held) if isinstance(held, datasets.DatasetDict) else [str(held.split)]
    if isinstance(held, datasets.DatasetDict):
        if source.split not in splits:
            raise BadData(
                f"{source.path} holds the splits {listed(splits)}, not {shorten(source.split)}",
                hint=f"write split: {splits[0]}" if splits else None,
            )
        held = held[source.split]
    elif source.split not in (None, *splits):
        raise BadData(f"{source.path} holds one split, {listed(splits)}, not '{source.split}'")
    return _first(held, limit)


def _first(held: Any, limit: int | None) -> Iterable[Any]:
    return held if limit is None else held.select(range(min(limit, len(held))))


def _reasoning_gym(source: ReasoningGymSource, limit: int | None) -> Iterable[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise BadEnvironment(
            "data of kind reasoning_gym need a package that is missing: "
            f"{error.name or 'reasoning_gym'}",
            hint="pip install reasoning-gym",
        ) from error
    if source.task not in DATASETS:
        like = nearest(source.task, DATASETS)
        raise BadData(
            f"reasoning-gym has no task '{source.task}'",
            hint=f"did you mean '{like}'?" if like else f"it has {listed(sorted(DATASETS))}",
        )
    _check_options(source, DATASETS[source.task][1])
    try:
        task = reasoning_gym.create_dataset(
            source.task, size=source.size, seed=source.seed, **source.options
        )
        return [task[i] for i in range(min(source.size, limit or source.size))]
    except Exception as error:  # a task may raise anything at settings that it cannot meet
        why = str(error) or type(error).__name__
        raise BadData(f"reasoning-gym's {source.task} refuses its options: {why}") from error


def _check_options(source: ReasoningGymSource, config: type) -> None:
    import dataclasses

    known = [f.name for f in dataclasses.fields(config) if f.name not in ("seed", "size")]
    for option in source.options:
        if option not in known:
            like = nearest(option, known)
            raise BadData(
                f"reasoning-gym's {source.task} has no option '{option}'",
                hint=f"did you mean '{like}'?" if like else f"it has {listed(known)}",
            )
