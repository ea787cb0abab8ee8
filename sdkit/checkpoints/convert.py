"""`sdkit checkpoint convert`: rewrites the newest checkpoint of a run, in place, for another number of ranks.

Student and optimizer shards are merged (zero_universal.py); each rank takes its shard when it loads.  The teacher's shards
are cut again here.  Step counters do not depend on ranks.  Each rank keeps the random state saved under its number; an
additional rank is seeded when it loads.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdkit import __version__
from sdkit.checkpoints import atomic, manifest, resume
from sdkit.checkpoints.checkpoint import PREFETCHED, TEACHER, rng_state_file, teacher_shard_file
from sdkit.checkpoints.manifest import Manifest
from sdkit.distributed import zero_universal
from sdkit.language.errors import UnreadableInput, counted
from sdkit.language.specs import ExperimentSpec, indivisible

SDKIT_FILES = ("random_rank_*.json", "teacher*.safetensors", manifest.NAME)
"""Files of a checkpoint that sdkit writes; the others are DeepSpeed's."""


def convert(spec: ExperimentSpec, run: Path, ranks: int, notify: resume.Notify) -> str:
    """Convert the newest checkpoint of a run to `ranks` ranks; returns a message that says what was done.

    The result takes the checkpoint's name when it is complete; only then is the original deleted.  Raises UnreadableInput
    if the prompts of a step cannot be divided among the ranks, if the run is still being trained or if it has nothing to
    convert, and BadEnvironment if the disk refuses.
    """
    if fault := indivisible(spec, ranks):
        size = spec.training.prompts_per_step
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise UnreadableInput(f"training.{fault}", hint=f"--processes can be {fitting}")
    resume.report_previous_attempt(run, notify)
    folder, old = _find_source(spec, run, notify)
    if old.origin.ranks == ranks:
        return f"{folder} fits {counted(ranks, 'rank')} already"
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        with atomic.delete_partial_on_error(partial, folder, then="convert again"):
            atomic.empty_folder(partial)
            _write_files(folder, partial, old, ranks)
            _write_manifest(partial, old, ranks)
            atomic.replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        f"{folder} fits {counted(ranks, 'rank')} now, {old.origin.ranks} before\n"
        f"continue with `sdkit train SPEC --to {run} --resume --processes {ranks}`"
    )


def _find_source(spec: ExperimentSpec, run: Path, notify: resume.Notify) -> tuple[Path, Manifest]:
    """The checkpoint to convert and its manifest; every hash is verified before anything is unpickled."""
    expected = manifest.origin(run, spec, ranks=0)
    source = resume.newest_valid_checkpoint(run, expected, notify, hashes=True)
    if not source:
        raise UnreadableInput(f"{run} has no checkpoint to convert", hint="set output.checkpoint_every")
    folder, old = source
    if old.zero_stage and not old.updates:
        raise UnreadableInput(
            f"{folder} stands before the first optimizer step: its optimizer has no state yet",
            hint="start again with --overwrite, on as many ranks as you like",
        )
    return source


def _write_files(source: Path, target: Path, old: Manifest, ranks: int) -> None:
    """Write everything except the manifest."""
    if old.zero_stage and not old.universal:
        zero_universal.rewrite(source, target)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*SDKIT_FILES), dirs_exist_ok=True)
    rng_files = [rng_state_file(rank) for rank in range(min(ranks, old.origin.ranks))]
    unsharded = [source / TEACHER, source / PREFETCHED]
    for path in [*(source / name for name in rng_files), *filter(Path.is_file, unsharded)]:
        shutil.copy2(path, target)
    if (source / teacher_shard_file(0)).is_file():
        _reshard_teacher(source, target, old.origin.ranks, ranks)


def _reshard_teacher(source: Path, target: Path, before: int, now: int) -> None:
    """Cut the teacher's averages from `before` shards into `now`, one new shard in memory at a time."""
    shapes = zero_universal.shapes(source)
    with contextlib.ExitStack() as stack:
        files: list[Any] = [
            stack.enter_context(safe_open(source / teacher_shard_file(rank), framework="pt")) for rank in range(before)
        ]
        names = files[0].keys()  # `0/NAME` for a routed teacher
        sizes = {name: shapes[name.rpartition("/")[2]].numel() for name in names}
        for rank in range(now):
            shard = {
                name: reshard([file.get_slice(name) for file in files], size, rank, now)
                for name, size in sizes.items()
            }
            save_file(shard, str(target / teacher_shard_file(rank)))


def reshard(parts: Sequence[Any], size: int, rank: int, ranks: int) -> Tensor:
    """The shard of `rank` of a parameter of `size` elements, from its shards on other ranks.  [K] each -> [size / ranks]

    All shards have the same length, rounded up, except the last ones, which stop at the parameter's end.  `parts` are
    slices of safetensors files; only the elements needed are read.
    """
    old_length, length = parts[0].get_shape()[0], math.ceil(size / ranks)
    start, stop = min(rank * length, size), min((rank + 1) * length, size)
    taken = [
        part[max(start - i * old_length, 0) : min(stop - i * old_length, old_length)]
        for i, part in enumerate(parts)
        if start < (i + 1) * old_length and stop > i * old_length
    ]
    return torch.cat([torch.empty(0), *taken])


def _write_manifest(folder: Path, old: Manifest, ranks: int) -> None:
    """Flush every file to disk and write the manifest."""
    for path in folder.rglob("*"):
        atomic.fsync(path)
    converted = evolve(
        old,
        origin=evolve(old.origin, ranks=ranks),
        sdkit=__version__,
        files={name: manifest.file_entry(folder / name) for name in manifest.file_names(folder)},
        universal=old.zero_stage > 0,
    )
    manifest.write(folder, converted)
