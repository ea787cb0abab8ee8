"""Reads data sets written by `datasets.save_to_disk`: all rows with that package, the first row without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdkit.language.errors import BadData, listed, shorten
from sdkit.language.files import MAX_CONFIG_BYTES, read_json_object
from sdkit.language.specs import DiskSource

SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
PLAIN = {"Value", "ClassLabel", "List", "LargeList", "Sequence", "Translation"}
"""Features that the package gives as Arrow stores them; it decodes others, such as images and JSON."""


def read_saved(source: DiskSource, base: Path) -> Any:
    """Returns the data set, or its split that the source names.  Raises BadData for another split."""
    import datasets

    return datasets.load_from_disk(str(_split_folder(source, base)))


def first_saved(source: DiskSource, base: Path) -> Iterable[Mapping[str, Any]]:
    """Yields the first row, read with pyarrow alone; nothing if a column needs the package to be decoded.

    Raises BadData for another split and for a folder without a data set, and as pyarrow does for a damaged file.
    """
    folder = _split_folder(source, base)
    info, state = (read_json_object(folder / name, MAX_CONFIG_BYTES) for name in (INFO, STATE))
    if info is None or state is None:
        raise BadData(f"{source.path} holds no data set of save_to_disk: {INFO} or {STATE} is missing")
    if set(_feature_types(info["features"])) <= PLAIN:
        for file in state["_data_files"]:
            for row in _arrow_rows(folder / file["filename"]):
                yield row
                return


def _split_folder(source: DiskSource, base: Path) -> Path:
    """The folder of the data set, or of one of its splits."""
    folder = base / source.path
    if saved := read_json_object(folder / SPLITS, MAX_CONFIG_BYTES):
        splits = saved["splits"]
        if source.split not in splits:
            raise BadData(
                f"{source.path} holds the splits {listed(splits)}, not {shorten(source.split)}",
                hint=f"write split: {splits[0]}" if splits else None,
            )
        return folder / str(source.split)
    state = read_json_object(folder / STATE, MAX_CONFIG_BYTES)
    if state and source.split not in (None, str(state["_split"])):
        raise BadData(f"{source.path} holds one split, '{state['_split']}', not '{source.split}'")
    return folder


def _feature_types(features: Any) -> Iterator[str]:
    """The types of all features, nested ones included."""
    if isinstance(features, list):
        for feature in features:
            yield from _feature_types(feature)
    elif isinstance(features, dict):
        if isinstance(features.get("_type"), str):
            yield features["_type"]
        for feature in features.values():
            yield from _feature_types(feature)


def _arrow_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of an Arrow stream, of which only what is needed is read."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            for i in range(batch.num_rows):
                yield batch.slice(i, 1).to_pylist()[0]
