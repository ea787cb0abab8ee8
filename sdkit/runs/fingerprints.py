"""SHA-256 of what a run uses besides its spec and rows: the user's code, and the models in local folders.

Models of the hub are identified by their commit (train/run_origin.py), installed packages by their version (provenance.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from sdkit.language.bundled import local_folder
from sdkit.language.errors import BadEnvironment
from sdkit.language.files import read_json_object, sha256_of, sha256_of_all
from sdkit.language.python_imports import with_imports
from sdkit.language.specs import ExperimentSpec
from sdkit.language.user_functions import module_search_path
from sdkit.runs.directory import write_atomically

Hashes = Mapping[str, str]
"""File → SHA-256, and model of the hub → commit.  Files are named relative to the spec's folder."""
Kind = Literal["code", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MODEL_FILES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Endings of the files that transformers reads from a model's folder: weights, configuration, tokenizer, chat template."""
CACHE = "hashes.json"
"""File of the cache folder: path → [size, time of last change, SHA-256]."""
SLOW_BYTES = 2**31


def of_code(spec: ExperimentSpec, base: Path) -> Hashes:
    """The hashes of the user's Python files and of the user's modules that they import, at any depth.

    Raises BadEnvironment if a file cannot be read.
    """
    files = [(base / file).resolve() for _, file in spec.user_files()]
    search = [Path(folder) for folder in module_search_path(files)]
    with _readable():
        return {_name(path, base): sha256_of(path) for path in with_imports(files, search)}


def of_models(spec: ExperimentSpec, base: Path, cache: Path, notify: Callable[[str], None]) -> Hashes:
    """The hashes of the files of the spec's local models.  Raises BadEnvironment if a file cannot be read.

    A file is read only if the folder `cache` does not have its hash; `notify` receives a message if that takes long.
    """
    with _readable():
        files = [path for folder in _model_folders(spec, base) for path in _model_files(folder)]
        return {_name(path, base): digest for path, digest in _hash_cached(files, cache, notify).items()}


def of_weights(folder: Path, cache: Path, notify: Callable[[str], None]) -> str:
    """One hash of all files of the model in a folder.  Raises and caches as `of_models` does."""
    with _readable():
        hashes = _hash_cached(_model_files(folder), cache, notify)
    named = {path.name: digest for path, digest in hashes.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def copy_code(code: Hashes, base: Path, folder: Path) -> None:
    """Copy these files into `folder`; for files outside the spec's folder, `..` becomes `__`.

    Raises BadEnvironment if a copy cannot be written, or if a file is no longer the one that was hashed.
    """
    for name, digest in code.items():
        target = folder.joinpath(*("__" if part == ".." else part for part in Path(name).parts))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, target)
            if sha256_of(target) != digest:
                raise BadEnvironment(f"{name} was changed while the run started", hint="start it again")
        except OSError as error:
            raise BadEnvironment(f"cannot copy {name} to {target}: {error.strerror}") from None


def differences(before: Hashes | None, now: Hashes) -> dict[str, str]:
    """The files that differ, each with what happened to it: changed, gone or new.  Empty if `before` is None."""
    if before is None:
        return {}
    kinds = {name: "changed" if name in before else "new" for name in now if before.get(name) != now[name]}
    return dict(sorted((kinds | dict.fromkeys(before.keys() - now.keys(), "gone")).items()))


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadEnvironment(f"cannot read {error.filename}: {error.strerror}") from None


def _name(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base.resolve())).as_posix()


def _model_folders(spec: ExperimentSpec, base: Path) -> Iterator[Path]:
    folders = (local_folder(path, base) for path in dict.fromkeys(spec.model_paths()))
    return (folder for folder in dict.fromkeys(folders) if folder)


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES and path.is_file())


def _hash_cached(paths: Iterable[Path], cache: Path, notify: Callable[[str], None]) -> dict[Path, str]:
    """The hash of each file, which is read only if it has changed since its hash was stored.  Raises OSError."""
    content = read_json_object(cache / CACHE) or {}
    stored = {path: entry for path, entry in content.items() if isinstance(entry, list)}
    # The time of the last change to the inode notices files that were replaced with their old time of modification.
    states = {path: [(s := path.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for path in paths}
    unknown = [path for path, state in states.items() if stored.get(str(path), [])[:-1] != state]
    size = sum(states[path][0] for path in unknown)
    if size > SLOW_BYTES:
        notify(f"hashing {size / 2**30:.0f} GiB of local models, once")
    hashes = zip(unknown, sha256_of_all(unknown), strict=True)
    stored |= {str(path): [*states[path], digest] for path, digest in hashes}
    if unknown:
        _store(stored, cache)
    return {path: stored[str(path)][-1] for path in states}


def _store(hashes: Mapping[str, object], cache: Path) -> None:
    """Store the hashes of files that still exist; a cache that cannot be written is left as it is."""
    existing = {path: entry for path, entry in hashes.items() if os.path.exists(path)}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / CACHE, json.dumps(existing) + "\n")
    except (OSError, BadEnvironment):
        return
