"""Reads raw rows, with their locations, from files, data sets, reasoning-gym and verifiers.  Knows nothing of columns or prompts.

A line of a JSON Lines or CSV file is named `file:line`, counted from 1; a row of any other source by its index, from 0.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, assert_never

from sdkit.data.saved_datasets import first_saved, read_saved
from sdkit.data.tasksets import read_tasks
from sdkit.language import specs
from sdkit.language.errors import BadData, BadEnvironment, counted, did_you_mean, first_line, listed, shorten
from sdkit.language.files import UnreadableFile, irregular_kind, needs_package, read_start
from sdkit.language.row_text import Fault, describe_value

Raw = Mapping[str, Any]
START = 2**24
"""Bytes of a file that are read for its first row."""
MOST_COUNTED = 2**30
"""Bytes of the largest file whose rows are counted."""
LONGEST_NUMBER = 4300
"""Digits of the longest integer that is read: Python's own limit."""

RawRows = list[tuple[str, Raw | Fault]]
"""Each row's location, and the row or the reason why it cannot be read."""


def source_name(source: specs.Source) -> str:
    """Returns the source's name in error messages."""
    match source:
        case specs.ReasoningGymSource():
            return f"reasoning-gym's {source.task}"
        case specs.VerifiersSource():
            return f"verifiers' {source.id}"
        case specs.InlineSource():
            return "data.source.rows"
        case _:
            return source.path


def read_source(source: specs.Source, base: Path, limit: int | None) -> RawRows:
    """Returns the first `limit` rows of a source.  Raises BadData; for a missing file it names a known origin."""
    name = source_name(source)
    if isinstance(source, specs.FileSource) and source.origin and not (base / source.path).exists():
        raise BadData(f"there is no {name}", hint=f"take it from {source.origin}")
    match source:
        case specs.JsonLinesSource():
            return _json_lines(_read_bytes(base / source.path, name), name, limit)
        case specs.CsvSource():
            return list(islice(_csv(_read_bytes(base / source.path, name), name, source.delimiter), limit))
        case specs.JsonSource():
            rows = _json(_read_bytes(base / source.path, name), name)
        case specs.ParquetSource():
            if kind := irregular_kind(base / source.path):
                raise BadData(f"cannot read {name}: {kind}")
            rows = _with_library(lambda: _parquet(base / source.path, limit), name)
        case specs.HubSource():
            rows = _with_library(lambda: _hub(source, limit), name)
        case specs.DiskSource():
            rows = _with_library(lambda: _take(read_saved(source, base), limit), name)
        case specs.ReasoningGymSource():
            rows = _reasoning_gym(source, limit)
        case specs.VerifiersSource():
            rows = map(_json_line, read_tasks(source, base, limit))
        case specs.InlineSource():
            rows = source.rows
        case _:
            assert_never(source)
    return [(f"{name} row {i}", _as_row(row)) for i, row in enumerate(islice(rows, limit))]


def read_first(source: specs.Source, base: Path) -> RawRows:
    """Returns the first row of a local file or folder, of which only the start is read; none for other sources, for a file
    that is not there yet, and where the row is longer than `START` bytes.  Raises as `read_source` does.
    """
    if not isinstance(source, specs.FileSource) or not (base / source.path).exists():
        return []
    name, path = source_name(source), base / source.path
    if isinstance(source, specs.DiskSource):
        return [(f"{name} row 0", _as_row(row)) for row in _with_library(lambda: first_saved(source, base), name)]
    if isinstance(source, specs.ParquetSource):
        rows = _with_library(lambda: islice(_parquet_file(path), 1), name)
        return _some([(f"{name} row 0", _as_row(row)) for row in rows], name)
    start = _read_bytes(path, name, START + 1)
    if len(start) <= START:
        return _some(read_source(source, base, 1), name)
    if isinstance(source, specs.JsonSource):
        return [(f"{name} row 0", _as_row(row)) for row in _first_of_list(start)]
    complete = start.rpartition(b"\n")[0]
    if isinstance(source, specs.CsvSource):
        return list(islice(_csv(complete, name, source.delimiter), 1))
    return _json_lines(complete, name, 1)


def _some(rows: RawRows, name: str) -> RawRows:
    """The rows, of which there must be one."""
    if not rows:
        raise BadData(f"{name} has no rows")
    return rows


def count_rows(data: specs.DataSpec, base: Path) -> int | None:
    """Returns the number of rows that a run reads, before those held out are dropped; None if it takes loading to tell."""
    try:
        rows = _count(data.source, base, source_name(data.source))
    except (BadData, BadEnvironment):  # the run reports it
        return None
    return rows if rows is None or data.limit is None else min(rows, data.limit)


def _count(source: specs.Source, base: Path, name: str) -> int | None:
    match source:
        case specs.InlineSource():
            return len(source.rows)
        case specs.ReasoningGymSource():
            return source.size
        case specs.HubSource() | specs.DiskSource() | specs.VerifiersSource():
            return None
        case specs.ParquetSource():
            path = base / source.path
            return None if irregular_kind(path) else _with_library(lambda: [_parquet_length(path)], name)[0]
        case specs.JsonLinesSource():
            return sum(1 for _ in _filled_lines(_countable(base / source.path, name)))
        case specs.CsvSource():
            return sum(1 for _ in _csv(_countable(base / source.path, name), name, source.delimiter))
        case specs.JsonSource():
            return len(_json(_countable(base / source.path, name), name))
        case _:
            assert_never(source)


def _countable(path: Path, name: str) -> bytes:
    if len(content := _read_bytes(path, name, MOST_COUNTED + 1)) > MOST_COUNTED:
        raise BadData(f"{name} is too large to count its rows")
    return content


def _first_of_list(start: bytes) -> list[Any]:
    """The first element of a JSON list whose end is not read; none if that element has no end."""
    text = start.decode(errors="replace").lstrip()
    decoder = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)
    try:
        return [decoder.raw_decode(text[1:].lstrip())[0]] if text.startswith("[") else []
    except (ValueError, RecursionError):
        return []


def _as_row(value: Any) -> Raw | Fault:
    if isinstance(value, Mapping | Fault):
        return value
    return Fault(f"{describe_value(value)}, not a map")


def _read_bytes(path: Path, name: str, size: int | None = None) -> bytes:
    """The first `size` bytes of a file, or all of them, without a byte order mark."""
    try:
        return read_start(path, size).removeprefix(b"\xef\xbb\xbf")
    except UnreadableFile as error:
        raise BadData(f"cannot read {name}: {error}") from error


def _json_lines(content: bytes, name: str, limit: int | None) -> RawRows:
    if content.lstrip()[:1] == b"[":
        raise BadData(f"{name} is a JSON list, not JSON Lines", hint="use kind: json")
    return [(f"{name}:{number}", _json_line(text)) for number, text in islice(_filled_lines(content), limit)]


def _filled_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the lines with text and their numbers, from 1."""
    # Not splitlines(): JSON text may contain U+2028 and the like, which end a line only in Python.
    return ((number, text) for number, text in enumerate(content.split(b"\n"), 1) if text.strip())


def _json_line(text: bytes) -> Raw | Fault:
    try:
        return _as_row(parse_json(text.decode()))
    except json.JSONDecodeError as error:
        return Fault(f"not JSON: {error.msg.lower()} at column {error.colno}")
    except UnicodeDecodeError:
        return Fault("not UTF-8")
    except RecursionError:
        return Fault("nested too deeply")


def _csv(content: bytes, name: str, delimiter: str) -> Iterator[tuple[str, Raw | Fault]]:
    """Yields the records after the first one, which names the columns.  A record may have several lines."""
    csv.field_size_limit(2**31 - 1)  # of the process; by default a cell has at most 131,072 characters
    reader = csv.reader(io.StringIO(_decode(content, name), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if repeated := [column for column in header if header.count(column) > 1]:
            raise BadData(f"{name} has the column {shorten(repeated[0])} twice")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"{name}:{start}", dict(zip(header, cells, strict=True))
            elif cells:  # an empty line has none
                yield f"{name}:{start}", Fault(f"{counted(len(cells), 'cell')}, but {counted(len(header), 'column')}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadData(f"{name}:{reader.line_num}: not CSV: {error}") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(f"{name}:{line}: not UTF-8", hint="save it as UTF-8") from error


def _json(content: bytes, name: str) -> list[Any]:
    try:
        value = parse_json(_decode(content, name))
    except RecursionError as error:
        raise BadData(f"{name} is nested too deeply") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and content.lstrip()[:1] == b"{"
        raise BadData(
            f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg.lower()}",
            hint="this looks like JSON Lines: use kind: jsonl" if lines else None,
        ) from error
    if not isinstance(value, list):
        one = "use kind: jsonl where each line is an object" if isinstance(value, dict) else None
        raise BadData(f"{name} holds {describe_value(value)}, not a list of objects", hint=one)
    return value


def parse_json(text: str) -> Any:
    """Parses JSON; a value that cannot be read becomes a Fault, which matters only if it is used."""
    return json.loads(text, parse_int=_integer, object_pairs_hook=_object)


def _integer(digits: str) -> int | Fault:
    if len(digits) > LONGEST_NUMBER:
        return Fault(f"a number of {len(digits)} digits, more than {LONGEST_NUMBER}")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> Raw | Fault:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        return Fault(f"a map that has the key {shorten(duplicate)} twice")
    return table


def _with_library(read: Callable[[], Iterable[Any]], name: str) -> list[Any]:
    """Reads rows with a library and translates its errors: it may raise anything for a damaged file."""
    try:
        return list(read())
    except (BadData, BadEnvironment, MemoryError):
        raise
    except ConnectionError as error:
        raise BadEnvironment(
            f"cannot reach the hub for {name}: {error}",
            hint="fill the cache where there is a network, or save the data to a file",
        ) from error
    except ImportError as error:
        raise BadEnvironment(f"{name} needs a package that is missing: {error.name}") from error
    except Exception as error:
        raise BadData(f"cannot read {name}: {first_line(error)}") from error


def _parquet(path: Path, limit: int | None) -> Iterable[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).slice(0, limit)
    if repeated := [n for n in table.column_names if table.column_names.count(n) > 1]:
        raise BadData(f"{path.name} has the column {shorten(repeated[0])} twice")
    try:
        return table.to_pylist()
    except Exception:  # read the rows one by one, to name the faulty one
        return list(_parquet_rows(table))


def _parquet_length(path: Path) -> int:
    """The number of rows in the file's footer; the rows are not read."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.metadata.num_rows


def _parquet_file(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file, of which only what is needed is read."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1):
            yield from batch.to_pylist()


def _parquet_rows(table: Any) -> Iterator[Any]:
    for i in range(len(table)):
        try:
            yield table.slice(i, 1).to_pylist()[0]
        except Exception as error:
            yield Fault(f"cannot be read: {first_line(error)}")


def _hub(source: specs.HubSource, limit: int | None) -> Iterable[Any]:
    import datasets

    dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    return _take(dataset, limit)


def _take(dataset: Any, limit: int | None) -> Iterable[Any]:
    dataset = dataset.with_format(None)  # a saved format would give tensors or arrays
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _reasoning_gym(source: specs.ReasoningGymSource, limit: int | None) -> Iterable[Any]:
    with needs_package("data of kind reasoning_gym", "reasoning-gym"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # from a package that it imports
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if source.task not in DATASETS:
        raise _unknown(f"reasoning-gym has no task '{source.task}'", source.task, sorted(DATASETS))
    _check_options(source, DATASETS[source.task][1])
    try:
        task = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.options)
        return [task[i] for i in range(min(source.size, limit or source.size))]
    except Exception as error:  # a task may raise anything for invalid options
        reason = str(error) or type(error).__name__
        raise BadData(f"reasoning-gym's {source.task} refuses its options: {reason}") from error


def _check_options(source: specs.ReasoningGymSource, config: type) -> None:
    known = [f.name for f in dataclasses.fields(config) if f.name not in ("seed", "size")]
    for option in source.options:
        if option not in known:
            raise _unknown(f"reasoning-gym's {source.task} has no option '{option}'", option, known)


def _unknown(message: str, word: str, known: Sequence[str]) -> BadData:
    return BadData(message, hint=did_you_mean(word, known) or f"it has {listed(known)}")
