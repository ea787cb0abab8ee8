"""`sdkit checkpoint convert`: the newest checkpoint of a run, rewritten for another number of ranks, in its place.

Student and optimizer are put together (zero_universal.py), and each rank takes its part of them when it loads.  A teacher's
pieces are cut anew; where the run stands does not depend on ranks.  A rank goes on with the random streams of its number,
a further one begins its own when it loads.
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
from sdkit.checkpoints.manifest import Manifest, Origin
from sdkit.distributed import zero_universal
from sdkit.language.errors import UnreadableInput, counted
from sdkit.language.specs import ExperimentSpec, indivisible
from sdkit.runs import directory

SDKIT_FILES = ("random_rank_*.json", "teacher*.safetensors", manifest.NAME)
"""What is not DeepSpeed's in a checkpoint."""


def convert(spec: ExperimentSpec, run: Path, ranks: int, say: resume.Notify) -> str:
    """Make the newest checkpoint of a run fit so many ranks; what was done, in words.

    It appears under the same name when it is complete, and only then the one before goes.  Raises UnreadableInput where
    the prompts of a step cannot be dealt to so many ranks, where the run is still being trained or has nothing to
    convert, and BadEnvironment where the disk refuses.
    """
    if found := indivisible(spec, ranks):
        size = spec.training.prompts_per_step
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise UnreadableInput(f"training.{found}", hint=f"--processes can be {fitting}")
    resume.report_previous_attempt(run, say)
    folder, held = _find_source(spec, run, say)
    if held.origin.ranks == ranks:
        return f"{folder} fits {counted(ranks, 'rank')} already"
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        with atomic.delete_partial_on_error(partial, folder, then="convert again"):
            atomic.empty_folder(partial)
            _write_files(folder, partial, held, ranks)
            _write_manifest(partial, held, ranks)
            atomic.replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        f"{folder} fits {counted(ranks, 'rank')} now, {held.origin.ranks} before\n"
        f"continue with `sdkit train SPEC --to {run} --resume --processes {ranks}`"
    )


def _find_source(spec: ExperimentSpec, run: Path, say: resume.Notify) -> tuple[Path, Manifest]:
    """The checkpoint to convert, read whole: nothing of it is unpickled before every hash is right."""
    own = Origin(run=directory.provenance(run).get("run"), spec=manifest.spec_digest(spec), ranks=0)
    found = resume.newest_valid_checkpoint(run, own, say, hashes=True)
    if not found:
        raise UnreadableInput(
            f"{run} has no checkpoint to convert", hint="set output.checkpoint_every"
        )
    folder, held = found
    if held.zero_stage and not held.updates:
        raise UnreadableInput(
            f"{folder} stands before the first optimizer step: its optimizer has no state yet",
            hint="start again with --overwrite, on as many ranks as you like",
        )
    return found


def _write_files(source: Path, target: Path, held: Manifest, ranks: int) -> None:
    """All but the manifest."""
    if held.zero_stage and not held.universal:
        zero_universal.rewrite(source, target)
    else:
        shutil.copytree(
            source, target, ignore=shutil.ignore_patterns(*SDKIT_FILES), dirs_exist_ok=True
        )
    kept = [rng_state_file(rank) for rank in range(min(ranks, held.origin.ranks))]
    whole = [source / TEACHER, source / PREFETCHED]
    for path in [*(source / name for name in kept), *filter(Path.is_file, whole)]:
        shutil.copy2(path, target)
    if (source / teacher_shard_file(0)).is_file():
        _reshard_teacher(source, target, held.origin.ranks, ranks)


def _reshard_teacher(source: Path, target: Path, before: int, now: int) -> None:
    """Each rank's pieces of the teacher's averages out of those of other ranks, one rank's at a time."""
    shapes = zero_universal.shapes(source)
    with contextlib.ExitStack() as stack:
        files: list[Any] = [
            stack.enter_context(safe_open(source / teacher_shard_file(rank), framework="pt"))
            for rank in range(before)
        ]
        names = files[0].keys()  # of a routed teacher `0/NAME`
        sizes = {name: shapes[name.rpartition("/")[2]].numel() for name in names}
        for rank in range(now):
            cut = {
                name: reshard([file.get_slice(name) for file in files], size, rank, now)
                for name, size in sizes.items()
            }
            save_file(cut, str(target / teacher_shard_file(rank)))


def reshard(parts: Sequence[Any], size: int, rank: int, ranks: int) -> Tensor:
    """A rank's piece of a parameter of `size` elements, out of the pieces of other ranks.  [K] each -> [size / ranks]

    Pieces of one parameter are equally long, rounded up, but the last ones, which end with it.  `parts` are slices of
    safetensors files, of which no more is read than is taken.
    """
    held, length = parts[0].get_shape()[0], math.ceil(size / ranks)
    start, stop = min(rank * length, size), min((rank + 1) * length, size)
    taken = [
        part[max(start - i * held, 0) : min(stop - i * held, held)]
        for i, part in enumerate(parts)
        if start < (i + 1) * held and stop > i * held
    ]
    return torch.cat([torch.empty(0), *taken])


def _write_manifest(folder: Path, held: Manifest, ranks: int) -> None:
    """Bring every file to the disk, and name it in the manifest."""
    for path in folder.rglob("*"):
        atomic.fsync(path)
    found = evolve(
        held,
        origin=evolve(held.origin, ranks=ranks),
        sdkit=__version__,
        files={name: manifest.file_entry(folder / name) for name in manifest.file_names(folder)},
        universal=held.zero_stage > 0,
    )
    manifest.write(folder, found)
