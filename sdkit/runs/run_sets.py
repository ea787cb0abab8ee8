"""A set of runs in one folder: one run for each seed, each point of a sweep, or each stage of a sequence.

set.json      the kind, and the members in order: overrides and resolved spec; written once, never changed
status.json   state of the set: running, done, stopped, interrupted or failed, with the process
NAME/         the run directory of a member, or a set of its own (the seeds of a sweep's point)
logs/         what each member printed, where several run at the same time
sweep.json    of a sweep: the scores that choose and report, the best point, and the verdict in words
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from attrs import frozen

from sdkit import processes
from sdkit.language.errors import UnreadableInput, first_of, shorten, spelled
from sdkit.language.files import read_json_object
from sdkit.language.resolved import leaves
from sdkit.runs.directory import MARK, STATUS, read_status, write_atomically

MANIFEST = "set.json"
LOGS = "logs"
CHOICE = "sweep.json"
Kind = Literal["seeds", "sweep", "sequence"]
State = Literal["not started", "running", "stopped", "failed", "diverged", "done"]
FINISHED: Sequence[State] = ("done", "diverged")
"""States of members that reached their last step: they are never run again."""
_STATES: Mapping[Any, State] = {
    "done": "done",
    "diverged": "diverged",
    "failed": "failed",
    "stopped": "stopped",
    "interrupted": "stopped",
}
"""The state of a member by that in its status.json; `running` depends on the process."""
_WITHOUT_INFLUENCE = ("output", "machine")
"""Parts of a spec that may differ between a set's start and its resumption; `training.deadline_seconds` may, too."""


@frozen(kw_only=True)
class Member:
    """One run of a set."""

    name: str  # of its folder
    spec: str  # path of the run file
    overrides: tuple[str, ...] = ()  # `key.path=value`: the user's, then those that make this member
    settings: Mapping[str, Any]  # its resolved spec, all overrides applied


@frozen(kw_only=True)
class RunSet:
    """A set of runs as its manifest describes it."""

    path: Path
    kind: Kind
    members: tuple[Member, ...]
    facts: Mapping[str, Any] = {}  # what the kind adds, as JSON values; such as the grid of a sweep

    def folder(self, member: Member) -> Path:
        """The run directory of a member."""
        return self.path / member.name

    def state(self, member: Member) -> State:
        """The state of a member, as its folder tells it."""
        return state_of(self.folder(member))

    def states(self) -> dict[str, State]:
        """Member name → state, in order."""
        return {member.name: self.state(member) for member in self.members}

    @property
    def unfinished(self) -> list[Member]:
        """The members that have not reached their last step, in order."""
        return [member for member in self.members if self.state(member) not in FINISHED]


def state_of(folder: Path) -> State:
    """The state of the run, or of the set of runs, in `folder`.

    A process that was killed leaves `running` behind: its state is then `stopped`, since it can be resumed.
    """
    status = read_status(folder)
    if status.get("state") == "running":
        alive = processes.is_running(status.get("pid"), status.get("process"))
        return "running" if alive else "stopped"
    return _STATES.get(status.get("state"), "not started")


def is_set(folder: Path) -> bool:
    """Whether the folder holds a set of runs."""
    return (folder / MANIFEST).is_file()


def read_set(folder: Path) -> RunSet:
    """The set of runs in `folder`.  Raises UnreadableInput if there is none, or its manifest cannot be read."""
    if not is_set(folder):
        raise UnreadableInput(f"{folder} is not a set of runs: it has no {MANIFEST}")
    facts = dict(read_json_object(folder / MANIFEST) or {})
    try:
        kind, members = facts.pop("kind"), facts.pop("members")
        if kind not in get_args(Kind) or not members:
            raise ValueError(f"kind is {shorten(kind)}, with {len(members)} members")
        read = [
            Member(name=m["name"], spec=m["spec"], overrides=tuple(m["overrides"]), settings=m["settings"])
            for m in members
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableInput(f"{folder / MANIFEST} is not a set's: {error!r}") from None
    return RunSet(path=folder, kind=kind, members=tuple(read), facts=facts)


def write_set(run_set: RunSet) -> None:
    """Create the folder of a set with its manifest.  Raises UnreadableInput if that is not possible."""
    _check_names(run_set)
    members = [
        {"name": m.name, "spec": m.spec, "overrides": list(m.overrides), "settings": m.settings}
        for m in run_set.members
    ]
    manifest = {"kind": run_set.kind, **run_set.facts, "members": members}
    try:
        run_set.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnreadableInput(f"cannot write to {run_set.path}: {error.strerror}") from None
    write_atomically(run_set.path / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")


def open_set(wanted: RunSet, *, resume: bool = False, overwrite: bool = False) -> None:
    """Begin the set of runs `wanted` in its folder, or check that it can be resumed there.

    Raises UnreadableInput if the folder is in use; with `resume` if it holds no set, another one, one whose specs have
    changed (which names member and key), or one that another process is running.
    """
    folder = wanted.path
    if resume:
        existing = read_set(folder)
        check_not_running(folder)
        check_same_set(existing, wanted)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UnreadableInput(
                f"{folder} exists",
                hint="continue it with --resume, replace it with --overwrite, or name another with --to",
            )
        if not is_set(folder):
            raise UnreadableInput(f"{folder} is not a set of runs, so --overwrite leaves it alone")
        check_not_running(folder)
        shutil.rmtree(folder)
    write_set(wanted)


def check_not_running(folder: Path) -> None:
    """Raise UnreadableInput if a living process is running the set in `folder`."""
    if state_of(folder) == "running":
        raise UnreadableInput(
            f"{folder} is still being run by process {read_status(folder)['pid']}",
            hint="wait for it, or stop it with SIGTERM: the running members save a checkpoint and end",
        )


def check_same_set(before: RunSet, now: RunSet) -> None:
    """Raise UnreadableInput, naming what has changed, if `now` is not the set that was begun as `before`."""
    hint = "resume with what set.json says, or start another set with --to"
    if before.kind != now.kind:
        raise UnreadableInput(f"{before.path} holds a set of kind {before.kind}, not {now.kind}", hint=hint)
    names = [[member.name for member in each.members] for each in (before, now)]
    if names[0] != names[1]:
        raise UnreadableInput(
            f"{before.path} was begun with the members {', '.join(names[0])}, not {', '.join(names[1])}", hint=hint
        )
    changed: dict[str, list[str]] = {}
    for old, new in zip(before.members, now.members, strict=True):
        for line in _changes(old.settings, new.settings):
            changed.setdefault(line, []).append(new.name)
    if changed:
        lines = [
            line if len(members) == len(names[0]) else f"{', '.join(members)}: {line}"
            for line, members in changed.items()
        ]
        raise UnreadableInput("the specs are not those that this set began with:\n" + first_of(lines), hint=hint)


def clear_unstarted(folder: Path) -> None:
    """Remove what a run has left that was killed while it created its run directory: it can be neither resumed nor begun."""
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if left and left <= {"spec.yaml", "tensorboard", f".{MARK}.partial"}:
        shutil.rmtree(folder)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ and influence training, one on a line; runs of one set must have one length, too."""
    old, new = (dict(leaves(json.loads(json.dumps(each)))) for each in (before, now))
    return [
        f"{spelled(path)}: {shorten(old.get(path))} then, {shorten(new.get(path))} now"
        for path in sorted(old.keys() | new.keys(), key=str)
        if old.get(path) != new.get(path)
        and path[0] not in _WITHOUT_INFLUENCE
        and path != ("training", "deadline_seconds")
    ]


def _check_names(run_set: RunSet) -> None:
    names = [member.name for member in run_set.members]
    reserved = {MANIFEST, STATUS, LOGS, MARK}
    bad = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,200}", name)]
    bad += [name for name in names if name in reserved or names.count(name) > 1]
    if bad or not names:
        raise ValueError(f"members of a set need folder names of their own: {', '.join(bad) or 'there are none'}")
