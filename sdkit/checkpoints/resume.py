"""`--resume`: what the last attempt came to, and whether this is the run that it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdkit.checkpoints import atomic, manifest
from sdkit.checkpoints.manifest import Manifest, Origin, UnusableCheckpoint
from sdkit.language.errors import UnreadableInput, counted, first_of, shorten, spelled
from sdkit.language.resolved import leaves
from sdkit.language.source import read, read_text
from sdkit.runs import directory, processes

Notify = Callable[[str], None]


def report_previous_attempt(run: Path, say: Notify) -> None:
    """Say where the last process ended without a word.  Raises UnreadableInput where it is still at work."""
    status = _status(run)
    if status.get("state") != "running":
        return
    if processes.alive(status.get("pid"), status.get("process")):
        raise UnreadableInput(
            f"{run} is still being trained by process {status['pid']}",
            hint="wait for it, or stop it with SIGTERM: it saves a checkpoint and ends",
        )
    say(
        f"the last attempt ended without a word after step {status.get('step', 0)}: it was killed, or the machine "
        "went down; the kernel kills when memory runs out (`dmesg` tells)"
    )


def newest_checkpoint(run: Path, expected: Origin, say: Notify, *, hashes: bool) -> Path | None:
    """The checkpoint that a run is taken up from: `newest_whole`, written by or converted for as many ranks as there are.

    None where an unfinished run has written none yet.  Raises UnreadableInput where there is none to take up.
    """
    found = newest_valid_checkpoint(run, expected, say, hashes=hashes)
    if found:
        folder, held = found
        convert = f"`sdkit checkpoint convert {run} --processes {expected.ranks}`"
        _check_rank_count(
            folder,
            held.origin.ranks,
            expected.ranks,
            f"continue with --processes {held.origin.ranks}, or make it fit first: {convert}",
        )
        return folder
    if _status(run).get("state") == "done":
        raise UnreadableInput(
            f"{run} has no checkpoint to resume from",
            hint="set output.checkpoint_every, or start again with --overwrite",
        )
    say("the run has no checkpoint yet: it begins anew")
    return None


def newest_valid_checkpoint(
    run: Path, expected: Origin, say: Notify, *, hashes: bool
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole and this run's own, of whatever number of ranks; None where there is not any.

    `say` is told of every newer one that is neither.  Raises UnreadableInput where of several none is left.
    """
    atomic.restore_folder(run / "checkpoints")
    faults: list[str] = []
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            found = manifest.read(folder, hashes=hashes)
            _check_origin(found, expected)
        except UnusableCheckpoint as unfit:
            faults.append(f"{folder.name} {unfit}")
            continue
        for fault in faults:
            say(f"passed over: {fault}")
        return folder, found
    if faults:
        raise UnreadableInput(
            f"{run} has no checkpoint that can be resumed from:\n" + first_of(faults),
            hint="start again with --overwrite",
        )
    return None


def check_usable(checkpoint: Path, run: str | None, ranks: int, *, hashes: bool) -> None:
    """Raise UnreadableInput where a recording cannot be replayed from a checkpoint: it is not whole, or another run's."""
    try:
        found = manifest.read(checkpoint, hashes=hashes)
        if found.origin.run != run:
            raise UnusableCheckpoint("belongs to another run")
    except UnusableCheckpoint as unfit:
        raise UnreadableInput(f"{checkpoint} {unfit}", hint="replay from another step") from None
    written = found.origin.ranks
    _check_rank_count(checkpoint, written, ranks, f"replay with --processes {written}")


def _status(run: Path) -> Mapping[str, Any]:
    """What status.json says; empty where it says nothing."""
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _check_origin(found: Manifest, expected: Origin) -> None:
    if found.origin.run != expected.run:
        raise UnusableCheckpoint("belongs to another run")
    if found.origin.spec != expected.spec:
        raise UnusableCheckpoint("was written under another spec")


def _check_rank_count(folder: Path, fits: int, now: int, hint: str) -> None:
    if fits != now:
        raise UnreadableInput(
            f"{folder.name} fits {counted(fits, 'rank')}, but there {'is' if now == 1 else 'are'} {now} now",
            hint=hint,
        )


def check_same_spec(run: Path, resolved: str) -> None:
    """A run continues under the spec it began with; only what `manifest.FREE` names may change."""
    before = dict(leaves(read(run / directory.MARK, resolved=True).data))
    now = dict(leaves(read_text(resolved, "the spec", resolved=True).data))
    changed = [
        f"{spelled(path)}: {shorten(before.get(path))} then, {shorten(now.get(path))} now"
        for path in sorted(before.keys() | now.keys(), key=str)
        if before.get(path) != now.get(path) and not manifest.may_change(path)
    ]
    if changed:
        raise UnreadableInput(
            "the spec is not the one that this run began with:\n" + first_of(changed),
            hint="resume with the values of the run's resolved.yaml, or start another run with --to",
        )


def check_same_data(run: Path, now: Mapping[str, str]) -> None:
    """A run continues on the rows it began with."""
    before: Mapping[str, Any] = directory.provenance(run).get("data", {})
    changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if changed:
        raise UnreadableInput(
            f"the rows are not those that this run began with: {', '.join(changed)}",
            hint="bring back the data as they were, or start another run with --to",
        )
