"""`--resume`: finds the checkpoint to continue from and checks that spec, data and ranks still match the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdkit.checkpoints import atomic, manifest
from sdkit.checkpoints.changeable import may_change_on_resume
from sdkit.checkpoints.manifest import Manifest, Origin, UnusableCheckpoint
from sdkit.language.errors import UnreadableInput, counted, first_of, shorten, spelled
from sdkit.language.resolved import leaves
from sdkit.language.source import read, read_text
from sdkit.runs import directory

Notify = Callable[[str], None]


def report_previous_attempt(run: Path, notify: Notify) -> None:
    """Report a previous process that exited without updating status.json.  Raises UnreadableInput if it is still running."""
    directory.check_not_running(run)
    status = directory.read_status(run)
    if status.get("state") != "running":
        return
    notify(
        f"the previous attempt exited without updating its status after step {status.get('step', 0)}: it was killed, "
        "or the machine went down; the kernel's out-of-memory killer reports to `dmesg`"
    )


def newest_checkpoint(run: Path, expected: Origin, notify: Notify, *, hashes: bool) -> Path | None:
    """The checkpoint to resume from: `newest_valid_checkpoint`, written by or converted to `expected.ranks` ranks.

    None if an unfinished run has not written a checkpoint yet.  Raises UnreadableInput if none can be resumed from.
    """
    newest = newest_valid_checkpoint(run, expected, notify, hashes=hashes)
    if newest:
        folder, facts = newest
        convert = f"`sdkit checkpoint convert {run} --processes {expected.ranks}`"
        _check_rank_count(
            folder,
            facts.origin.ranks,
            expected.ranks,
            f"continue with --processes {facts.origin.ranks}, or make it fit first: {convert}",
        )
        return folder
    status = directory.read_status(run)
    if status.get("state") in ("done", "diverged"):
        raise UnreadableInput(
            f"{run} ended at step {status.get('step')} of {status.get('steps')} and has no checkpoint to resume from",
            hint="start again with --overwrite, or take its model/ as the start of another run; "
            "output.checkpoint_every below the number of steps leaves a checkpoint",
        )
    notify("the run has no checkpoint yet: it starts from the beginning")
    return None


def newest_valid_checkpoint(
    run: Path, expected: Origin, notify: Notify, *, hashes: bool
) -> tuple[Path, Manifest] | None:
    """The newest intact checkpoint of this run, for any number of ranks, with its manifest; None if there are none.

    `notify` receives the reason for each newer checkpoint that is passed over.  Raises UnreadableInput if checkpoints
    exist but none is usable.
    """
    atomic.restore_folder(run / "checkpoints")
    faults: list[str] = []
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            facts = manifest.read(folder, hashes=hashes)
            _check_origin(facts, expected)
        except UnusableCheckpoint as error:
            faults.append(f"{folder.name} {error}")
            continue
        for fault in faults:
            notify(f"passed over: {fault}")
        return folder, facts
    if faults:
        raise UnreadableInput(
            f"{run} has no checkpoint that can be resumed from:\n" + first_of(faults),
            hint="start again with --overwrite",
        )
    return None


def check_usable(checkpoint: Path, run: str | None, ranks: int, *, hashes: bool) -> None:
    """Raise UnreadableInput if a replay cannot start from `checkpoint`: it is damaged, or belongs to another run."""
    try:
        facts = manifest.read(checkpoint, hashes=hashes)
        if facts.origin.run != run:
            raise UnusableCheckpoint("belongs to another run")
    except UnusableCheckpoint as error:
        raise UnreadableInput(f"{checkpoint} {error}", hint="replay from another step") from None
    written = facts.origin.ranks
    _check_rank_count(checkpoint, written, ranks, f"replay with --processes {written}")


def _check_origin(facts: Manifest, expected: Origin) -> None:
    if facts.origin.run != expected.run:
        raise UnusableCheckpoint("belongs to another run")
    if facts.origin.spec != expected.spec:
        raise UnusableCheckpoint("was written under another spec")


def _check_rank_count(folder: Path, written: int, now: int, hint: str) -> None:
    if written != now:
        raise UnreadableInput(
            f"{folder.name} fits {counted(written, 'rank')}, but there {'is' if now == 1 else 'are'} {now} now",
            hint=hint,
        )


def check_same_spec(run: Path, resolved: str) -> None:
    """Raise UnreadableInput if the spec differs from the run's in anything but `CHANGEABLE_ON_RESUME`."""
    before = dict(leaves(read(run / directory.MARK, resolved=True).data))
    now = dict(leaves(read_text(resolved, "the spec", resolved=True).data))
    changed = [
        f"{spelled(path)}: {shorten(before.get(path))} then, {shorten(now.get(path))} now"
        for path in sorted(before.keys() | now.keys(), key=str)
        if before.get(path) != now.get(path) and not may_change_on_resume(path)
    ]
    if changed:
        raise UnreadableInput(
            "the spec is not the one that this run began with:\n" + first_of(changed),
            hint="resume with the values of the run's resolved.yaml, or start another run with --to",
        )


def check_same_data(run: Path, now: Mapping[str, str]) -> None:
    """Raise UnreadableInput if the rows differ from those that the run started with."""
    before: Mapping[str, Any] = directory.provenance(run).get("data", {})
    changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if changed:
        raise UnreadableInput(
            f"the rows are not those that this run began with: {', '.join(changed)}",
            hint="bring back the data as they were, or start another run with --to",
        )
