"""Records in provenance.json what a run is made from, and refuses code and models that have changed since."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from rich.console import Console

from sdkit.checkpoints import manifest
from sdkit.distributed import collectives
from sdkit.language.bundled import PREFIX, local_folder
from sdkit.language.errors import UnreadableInput, first_of
from sdkit.language.files import read_json_object
from sdkit.language.specs import ExperimentSpec, OutputSpec
from sdkit.models.loading import cache_folder, hub_commit, resolve_model
from sdkit.runs import directory, fingerprints, git
from sdkit.runs.directory import RunDirectory
from sdkit.runs.fingerprints import Hashes, Kind
from sdkit.runs.provenance import attempt, provenance
from sdkit.runs.trackers import Trackers
from sdkit.stdout import is_first_on_machine, print_warning
from sdkit.train import prompt_record
from sdkit.train.replay import Recording
from sdkit.train.trainer import Trainer

DIFF = "git.diff"


@frozen(eq=False, kw_only=True)
class RunFiles:
    """The hashes of a run's code and local models, and which changes of them an option accepted.

    Every rank hashes the code; of the ranks on one machine, the first alone hashes the models.
    """

    hashes: Mapping[Kind, Hashes]
    accepted: Mapping[Kind, Mapping[str, str | None]]  # each changed file's hash before; None: the file is new
    before: Hashes | None = None  # hashes of the models where the run continues
    since: str = ""  # what has recorded them
    accepts_models: bool = False


def check_files(
    spec: ExperimentSpec,
    base: Path,
    checkpoint: Path | None,
    recording: Recording | None,
    accept: Collection[Kind],
    console: Any,
) -> RunFiles:
    """Hash the code and the local models of a run that continues from `checkpoint` or trains on a recording.

    Raises UnreadableInput, which names the files, if they differ from those recorded there and `accept` does not have
    their kind.
    """

    def notify(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    now: dict[Kind, Hashes] = {"code": fingerprints.of_code(spec, base)}
    if is_first_on_machine():
        now["models"] = fingerprints.of_models(spec, base, cache_folder(), notify)
    if checkpoint:
        before, since = _of_checkpoint(checkpoint), f"{checkpoint} was written"
        copies = [folder for folder in _all_copies(checkpoint.parents[1]) if folder.name < checkpoint.name]
    elif recording:
        before, since = _of_recording(recording, now), f"{recording.run} was recorded"
        copies = _all_copies(recording.run)
    else:
        return RunFiles(hashes=now, accepted={})
    hub = {name for name, _, _ in _hub_models(spec, base)}
    local = {kind: hashes and {k: v for k, v in hashes.items() if k not in hub} for kind, hashes in before.items()}
    changes = {kind: fingerprints.differences(local[kind], now[kind]) for kind in now}
    refused: list[Kind] = [kind for kind in now if changes[kind] and kind not in accept]
    if refused:
        faults = [f"{name}: {what}" for kind in refused for name, what in changes[kind].items()]
        message = f"files of the run have changed since {since}:\n" + first_of(faults)
        raise UnreadableInput(message, hint=_ways_out(refused, copies))
    accepted: dict[Kind, dict[str, str | None]] = {
        kind: {name: (before[kind] or {}).get(name) for name in changes[kind]} for kind in now if changes[kind]
    }
    models = recording.origin.get("models") if recording else before["models"]
    return RunFiles(hashes=now, accepted=accepted, before=models, since=since, accepts_models="models" in accept)


def with_hub_models(files: RunFiles, spec: ExperimentSpec, base: Path) -> RunFiles:
    """Returns the files with the commit of each model that was loaded from the hub, where the cache names it.

    Raises UnreadableInput on every rank if a model has another commit than before and no option accepts it, or if a rank
    has other code than the first: a machine may have an older copy.
    """
    _check_same_code(files)
    known = {name: hub_commit(path, revision) for name, path, revision in _hub_models(spec, base)}
    now = {name: commit for name, commit in known.items() if commit}
    changed = {name: b for name, commit in now.items() if (b := (files.before or {}).get(name, commit)) != commit}
    if changed and not files.accepts_models:
        faults = [f"{name}: commit {before} then, {now[name]} now" for name, before in changed.items()]
        message = f"models of the hub have changed since {files.since}:\n" + first_of(faults)
        hint = "accept them with --changed-models; in a new run, `revision` says which commit to use"
        raise UnreadableInput(message, hint=hint)
    if "models" not in files.hashes:
        return files
    accepted = {"models": {**files.accepted.get("models", {}), **changed}} if changed else {}
    hashes = {**files.hashes, "models": {**files.hashes["models"], **now}}
    return evolve(files, hashes=hashes, accepted={**files.accepted, **accepted})


def _hub_models(spec: ExperimentSpec, base: Path) -> list[tuple[str, str, str | None]]:
    """Name, hub id and revision of each model of the hub."""
    models = (spec.model, *(weights for _, weights in spec.other_models()))
    ids = [m for m in models if not m.path.startswith(PREFIX) and not local_folder(m.path, base)]
    return [(f"{m.path}@{m.revision}" if m.revision else m.path, m.path, m.revision) for m in ids]


def _check_same_code(files: RunFiles) -> None:
    first = collectives.broadcast_object(files.hashes["code"])
    differences = collectives.all_gather_object(fingerprints.differences(first, files.hashes["code"]))
    faults = [f"rank {rank}, {name}: {what}" for rank, files in enumerate(differences) for name, what in files.items()]
    if faults:
        raise UnreadableInput("the code of the ranks is not that of the first rank:\n" + first_of(faults))


def _ways_out(refused: Collection[Kind], copies: Sequence[Path]) -> str:
    """The hint that says where the files are as they were, and which options accept them as they are."""
    kept = f" ({copies[-1]} has the code)" if "code" in refused and copies else ""
    options = " ".join(f"--changed-{kind}" for kind in refused)
    return f"bring them back{kept}, or accept them as they are now with {options}"


def warn_of_changed_code(spec: ExperimentSpec, base: Path, run: Path, console: Any) -> None:
    """Print a warning if the code is not what the run in `run` used last."""
    changed = fingerprints.differences(directory.provenance(run).get("code"), fingerprints.of_code(spec, base))
    if changed:
        files = ", ".join(f"{name} ({what})" for name, what in changed.items())
        print_warning(console, f"code has changed since {run} used it, so its scores may not be comparable: {files}")


def _of_checkpoint(checkpoint: Path) -> dict[Kind, Hashes | None]:
    origin = manifest.read(checkpoint, hashes=False).origin
    return {"code": origin.code, "models": origin.models}


def _of_recording(recording: Recording, now: Mapping[Kind, Hashes]) -> dict[Kind, Hashes | None]:
    """The hashes of the files that recording and replay have in common: a replay may name other files.

    A file that the recorded run changed on its way has no hash there that holds for all batches.
    """
    before: dict[Kind, Hashes | None] = {}
    for kind in now:
        recorded: Mapping[str, str] = recording.origin.get(kind, {})
        later = (c for c in recording.origin.get("accepted_changes", ()) if c["step"] > recording.start)
        several = {name for change in later for name in change.get(kind, ())}
        before[kind] = {
            name: "several" if name in several else recorded.get(name, digest) for name, digest in now[kind].items()
        }
    return before


def write(
    run: RunDirectory,
    trainer: Trainer,
    recording: Recording | None,
    files: RunFiles,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write provenance.json of a new run, the uncommitted changes of the spec's repository, and copies of the code.

    `earlier` are attempts that ended before their first checkpoint.
    """
    base, step = trainer.setup.base, recording.start if recording else 0
    facts = {**_facts(trainer, recording), **files.hashes, **_accepted(files, step)}
    facts["attempts"] = [*earlier, _attempt(step)]
    run.write_json(directory.ORIGIN, provenance(base, **facts))
    if changes := git.diff(base):
        run.write_text(DIFF, changes)
    fingerprints.copy_code(files.hashes["code"], base, _copies(run, step))


def open_directory(folder: Path, output: OutputSpec, console: Console, *, resume: bool, replace: bool) -> RunDirectory:
    """The run directory; only the first rank writes to it, and only that one has trackers.

    `replace` allows a new run in place of an older one.  Raises UnreadableInput if another process has begun one meanwhile.
    """
    if collectives.rank():
        return directory.ReadOnly(folder)
    trackers = Trackers(output.trackers, warn=lambda text: print_warning(console, text))
    if not resume:
        return directory.create(folder, trackers, replace=replace)
    directory.check_not_running(folder)
    return directory.RunDirectory(folder, trackers)


def update(run: RunDirectory, base: Path, step: int, files: RunFiles) -> None:
    """Record in provenance.json of a run that is resumed after `step` what it continues with, and copy changed code."""
    facts = directory.provenance(run.path)
    earlier = [change for change in facts.get("accepted_changes", []) if change["step"] < step]
    before = facts.get("code")
    facts["attempts"] = [*earlier_attempts(run.path), _attempt(step)]
    facts |= {**files.hashes, "accepted_changes": earlier, **_accepted(files, step, earlier)}
    run.write_json(directory.ORIGIN, facts)
    target = _copies(run, step)
    for folder in _all_copies(run.path):
        if folder.name > target.name or (folder.name == target.name and before != files.hashes["code"]):
            shutil.rmtree(folder)
    if before != files.hashes["code"]:
        fingerprints.copy_code(files.hashes["code"], base, target)


def earlier_attempts(run: Path) -> list[dict[str, Any]]:
    """The attempts in provenance.json of a run, the latest with when and how it ended.

    Of one that was killed, the last step that it reported.
    """
    attempts, file = directory.provenance(run).get("attempts", []), run / "status.json"
    status = read_json_object(file) or {}
    if attempts and status:
        facts = {name: status[name] for name in ("state", "step", "reason") if name in status}
        at = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
        attempts[-1]["ended"] = {"at": at, **facts}
    return attempts


def _attempt(step: int) -> dict[str, Any]:
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return attempt(step, collectives.world_size(), accelerators)


def _accepted(files: RunFiles, step: int, earlier: Collection[Any] = ()) -> dict[str, Any]:
    """The entry of provenance.json that lists the changes that an option accepted; none if there are none."""
    if not files.accepted:
        return {}
    change = {"step": step, "at": datetime.now(UTC).isoformat(timespec="seconds"), **files.accepted}
    return {"accepted_changes": [*earlier, change]}


def _copies(run: RunDirectory, step: int) -> Path:
    """The folder with the code that a run uses after this step; it has the name of the step's checkpoint."""
    return run.path / "code" / f"step_{step:06d}"


def _all_copies(run: Path) -> list[Path]:
    return sorted((run / "code").glob("step_*"))


def _facts(trainer: Trainer, recording: Recording | None) -> dict[str, Any]:
    setup = trainer.setup
    spec, data = setup.spec, setup.data
    model = {"path": spec.model.path, "revision": spec.model.revision, "located": setup.model_folder}
    model["commit"] = getattr(trainer.models.student.causal.config, "_commit_hash", None)
    others = [
        {"path": w.path, "revision": w.revision, "located": resolve_model(w.path, setup.base)}
        for _, w in spec.other_models()
    ]
    served = [{"url": w.url, "model": w.model, "root": model.root} for w, model in trainer.served.items()]
    return {
        "run": secrets.token_hex(8),
        "data": data.fingerprints(),
        "prompts": prompt_record.provenance_entry(data),
        "model": model,
        "other_models": others,
        "served_teachers": served,
        "seed": spec.training.seed,
        **({"replayed": recording.facts} if recording else {}),
    }
