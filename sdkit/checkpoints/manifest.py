"""What a checkpoint says of itself: MANIFEST.json names its origin, and every file with its size and SHA-256.

It is written last and holds a digest of its own, so what was cut off, changed, added or brought from elsewhere is seen.
It is no signature: who can write to a run directory can write a manifest too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from attrs import asdict, frozen

from sdkit.checkpoints import atomic
from sdkit.language.errors import Path as SpecPath
from sdkit.language.resolved import leaves, resolved
from sdkit.language.specs import ExperimentSpec

NAME = "MANIFEST.json"
CHANGEABLE_ON_RESUME = frozenset(
    {
        ("output",),
        *(
            ("rollout", "backend", key)
            for key in ("urls", "key_from", "allow_remote", "folder", "deadline_seconds")
        ),
        ("training", "steps"),
        ("training", "epochs"),
        ("training", "micro_batch_tokens"),
        ("training", "chunk_tokens"),
        ("model", "activation_checkpointing"),
    }
)
"""What may change when a run is continued, with all beneath it: its length, its output, what its memory is spent on, where
its rollout servers are."""


def may_change(path: SpecPath) -> bool:
    """Whether this key may be another when a run is continued."""
    return any(path[: len(key)] == key for key in CHANGEABLE_ON_RESUME)


@frozen(kw_only=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str


@frozen(kw_only=True)
class Origin:
    """What must be the same for a checkpoint to be taken up."""

    run: str | None  # the word drawn when the run began
    spec: str
    ranks: int


@frozen(kw_only=True)
class Manifest:
    """Where a run stood, who wrote that down, and in which files."""

    origin: Origin
    step: int
    updates: int
    skipped: int
    zero_stage: int
    sdkit: str
    files: Mapping[str, FileEntry]
    universal: bool = False  # DeepSpeed's files were rewritten for any number of ranks


class UnusableCheckpoint(Exception):
    """A checkpoint that must not be read; the message says why."""


def spec_digest(spec: ExperimentSpec) -> str:
    """SHA-256 of all that a spec says, but what may change when a run is continued."""
    held = [(list(path), value) for path, value in leaves(resolved(spec)) if not may_change(path)]
    return _digest(sorted(held, key=str))


def file_names(folder: Path) -> list[str]:
    """The files of a checkpoint, without its manifest."""
    files = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if name != NAME)


def file_entry(path: Path) -> FileEntry:
    """A file as it is on disk.  Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def write(folder: Path, manifest: Manifest) -> None:
    """Complete a checkpoint's folder, and bring it to the disk.  Raises OSError."""
    facts = asdict(manifest)
    text = json.dumps({"digest": _digest(facts), **facts}, indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    for path in (folder / NAME, folder):
        atomic.fsync(path)


def read(folder: Path, *, hashes: bool) -> Manifest:
    """The manifest of a folder that holds what it says: every file of the right size, with `hashes` the very bytes.

    Raises Unfit.
    """
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
        stated = facts.pop("digest")
        files = {name: FileEntry(**file) for name, file in facts.pop("files").items()}
        found = Manifest(origin=Origin(**facts.pop("origin")), files=files, **facts)
    except FileNotFoundError:
        raise UnusableCheckpoint(f"is not complete: it has no {NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UnusableCheckpoint(f"has a {NAME} that cannot be read") from None
    if _digest(asdict(found)) != stated:
        raise UnusableCheckpoint(f"has a {NAME} that was changed")
    present = file_names(folder)
    if strange := set(present) - set(files):
        raise UnusableCheckpoint(f"has a file that does not belong to it: {min(strange)}")
    for name, file in files.items():
        _check_file(folder / name, name, file, hashes=hashes)
    return found


def _check_file(path: Path, name: str, file: FileEntry, *, hashes: bool) -> None:
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise UnusableCheckpoint(f"is damaged: {name} has {size} bytes instead of {file.bytes}")
        if hashes and file_entry(path) != file:
            raise UnusableCheckpoint(f"is damaged: {name} is not what was written (SHA-256)")
    except FileNotFoundError:
        raise UnusableCheckpoint(f"is damaged: {name} is missing") from None
    except OSError as error:
        raise UnusableCheckpoint(f"cannot be read: {name}: {error.strerror}") from None


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
