"""MANIFEST.json of a checkpoint: its origin, and the size and SHA-256 of every file.

The manifest is written last and contains a digest of itself, so truncated, changed, added or foreign files are detected.
It is not a signature: anyone who can write to the run directory can also write a manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from attrs import asdict, frozen

from sdkit.checkpoints import atomic
from sdkit.checkpoints.changeable import may_change_on_resume
from sdkit.language.files import sha256_of, sha256_of_all
from sdkit.language.resolved import leaves, resolved
from sdkit.language.specs import ExperimentSpec
from sdkit.runs import directory
from sdkit.runs.fingerprints import KINDS, Hashes

NAME = "MANIFEST.json"


@frozen(kw_only=True)
class FileEntry:
    """Size and hash of a file as it was written."""

    bytes: int
    sha256: str


@frozen(kw_only=True)
class Origin:
    """What must match before a checkpoint may be resumed."""

    run: str | None  # random identifier, drawn when the run started
    spec: str
    ranks: int
    code: Hashes | None = None  # None: written by an sdkit that did not record them
    models: Hashes | None = None


@frozen(kw_only=True)
class Manifest:
    """The progress of a run at a checkpoint, the checkpoint's origin and its files."""

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
    """SHA-256 of all values of a spec except those that may change on resume."""
    fixed = [(list(path), value) for path, value in leaves(resolved(spec)) if not may_change_on_resume(path)]
    return _digest(sorted(fixed, key=str))


def origin(run: Path, spec: ExperimentSpec, ranks: int) -> Origin:
    """The origin of the checkpoints that `ranks` ranks write to a run directory under this spec."""
    facts = directory.provenance(run)
    files = {kind: facts.get(kind) for kind in KINDS}
    return Origin(run=facts.get("run"), spec=spec_digest(spec), ranks=ranks, **files)


def file_names(folder: Path) -> list[str]:
    """Paths of the checkpoint's files relative to `folder`, sorted, without the manifest."""
    files = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if name != NAME)


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file on disk.  Raises OSError."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the checkpoint, and flush it to disk.  Raises OSError."""
    facts = asdict(manifest)
    text = json.dumps({"digest": _digest(facts), **facts}, indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    for path in (folder / NAME, folder):
        atomic.fsync(path)


def read(folder: Path, *, hashes: bool) -> Manifest:
    """Returns the manifest after checking that every file has the stated size and, with `hashes`, the stated SHA-256.

    Raises UnusableCheckpoint.
    """
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
        intact = facts.pop("digest") == _digest(facts)
        files = {name: FileEntry(**file) for name, file in facts.pop("files").items()}
        manifest = Manifest(origin=Origin(**facts.pop("origin")), files=files, **facts)
    except FileNotFoundError:
        raise UnusableCheckpoint(f"is not complete: it has no {NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UnusableCheckpoint(f"has a {NAME} that cannot be read") from None
    if not intact:
        raise UnusableCheckpoint(f"has a {NAME} that was changed")
    present = file_names(folder)
    if unknown := set(present) - set(files):
        raise UnusableCheckpoint(f"has a file that does not belong to it: {min(unknown)}")
    try:
        _check_files(folder, files, hashes=hashes)
    except OSError as error:
        name = Path(error.filename).relative_to(folder)
        raise UnusableCheckpoint(f"cannot be read: {name}: {error.strerror}") from None
    return manifest


def _check_files(folder: Path, files: Mapping[str, FileEntry], *, hashes: bool) -> None:
    """Raise UnusableCheckpoint at the first file that is not what was written; OSError if one cannot be read."""
    for name, file in files.items():
        if not (folder / name).is_file():
            raise UnusableCheckpoint(f"is damaged: {name} is missing")
        if (size := (folder / name).stat().st_size) != file.bytes:
            raise UnusableCheckpoint(f"is damaged: {name} has {size} bytes instead of {file.bytes}")
    if hashes:
        digests = sha256_of_all([folder / name for name in files])
        changed = [name for name, digest in zip(files, digests, strict=True) if digest != files[name].sha256]
        if changed:
            raise UnusableCheckpoint(f"is damaged: {changed[0]} is not what was written (SHA-256)")


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
