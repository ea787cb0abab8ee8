"""Write the world down, and take it up again; the trained model in Hugging Face format.

checkpoints/step_000010/  the state after ten rollout batches, complete where it has this name
    MANIFEST.json                 origin (run, spec, ranks), step, updates, skipped, zero_stage, and every file's SHA-256
    random_rank_R.json            each rank's random streams
    teacher.safetensors           float32 averages by the student's parameter names, where a teacher moves (of a routed
                                  teacher with its part's number before: `0/NAME`); under stage 3 each rank's flat
                                  pieces: teacher_rank_R.safetensors
    mp_rank_*, *zero_pp_rank_*    DeepSpeed's: student, masters, optimizer moments (pickles: only ever this run's own)
    ahead.jsonl                   rollouts sampled ahead of their turn, with rollout.max_staleness
    zero/NAME/                    instead of the ranks' own, where it was converted: a parameter's master and moments, whole
model/                    config, safetensors, tokenizer; with LoRA the adapter merged into a copy, and
adapter/                  the adapter alone
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit import __version__
from sdkit.checkpoints import atomic, manifest, rng
from sdkit.checkpoints.manifest import Manifest, Origin
from sdkit.distributed import collectives
from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput, one_line
from sdkit.runs import directory

if TYPE_CHECKING:
    from sdkit.train.state import TrainState

TEACHER = "teacher.safetensors"
PREFETCHED = "ahead.jsonl"
"""Rollout batches that were sampled ahead of their turn."""
FILE_BYTES = 5 * 10**9
"""Of the largest file of a written model: what the first rank holds of it at once."""


def save(world: TrainState, run: Path) -> Path:
    """A complete checkpoint of the world at its step; its name appears only when everything is on disk.

    Older ones go afterwards.  Raises BadEnvironment where it cannot be written: then they are as they were.
    """
    if world.prefetcher:
        world.prefetcher.wait(world)
    folder = run / "checkpoints"
    tag = f"step_{world.step:06d}"
    partial, final = folder / f".partial-{tag}", folder / tag
    with atomic.writing(partial, final):
        _together(lambda: atomic.empty_folder(partial) if collectives.rank() == 0 else None)
        world.zero.save(folder, partial.name)
        _together(lambda: _write_own(world, partial))
        _complete(world, run, partial)
        if collectives.rank() == 0:
            atomic.replace_folder(partial, final)
            _forget_older(final, world.spec.output.keep_checkpoints)
        collectives.barrier()
    return final


def _together(write: Callable[[], None]) -> None:
    """Write on every rank; where one of them cannot, all raise OSError."""
    fault = None
    try:
        write()
    except Exception as error:
        if (fault := atomic.fault(error)) is None:
            raise
    if faults := [found for found in collectives.all_gather_object(fault) if found]:
        raise OSError(faults[0])


def _write_own(world: TrainState, folder: Path) -> None:
    """What DeepSpeed does not keep: random streams, and the teacher's averages, of what this rank holds."""
    held = json.dumps(rng.state())
    (folder / streams_file(collectives.rank())).write_text(held, encoding="utf-8")
    if collectives.rank() == 0 or world.plan.zero_stage == 3:
        if world.teacher and (state := world.teacher.state()):
            tensors = {name: t.contiguous() for name, t in state.items()}
            save_file(tensors, str(folder / _teacher_file(world)))
    if world.prefetcher:
        world.prefetcher.write(folder)


def streams_file(rank: int) -> str:
    """Where a rank's random streams are."""
    return f"random_rank_{rank}.json"


def teacher_pieces(rank: int) -> str:
    """Where a rank's pieces of the teacher's averages are, under stage 3."""
    return f"teacher_rank_{rank}.safetensors"


def _teacher_file(world: TrainState) -> str:
    return teacher_pieces(collectives.rank()) if world.plan.zero_stage == 3 else TEACHER


def _complete(world: TrainState, run: Path, folder: Path) -> None:
    """Bring every file to the disk and name it in the manifest; the files are dealt out to the ranks."""
    names = collectives.broadcast_object(manifest.file_names(folder))
    own: dict[str, manifest.File] = {}

    def finish() -> None:
        for i in collectives.shard_indices(len(names)):
            atomic.sync(folder / names[i])
            own[names[i]] = manifest.describe(folder / names[i])

    _together(finish)
    files = {
        name: file for part in collectives.all_gather_object(own) for name, file in part.items()
    }
    found = Manifest(
        origin=_origin(world, run),
        step=world.step,
        updates=world.optimizer_steps,
        skipped=world.skipped,
        zero_stage=world.plan.zero_stage,
        sdkit=__version__,
        files=dict(sorted(files.items())),
    )
    _together(lambda: manifest.write(folder, found) if collectives.rank() == 0 else None)


def _origin(world: TrainState, run: Path) -> Origin:
    """Which run, spec and number of ranks this is."""
    return Origin(
        run=directory.provenance(run).get("run"),
        spec=manifest.spec_digest(world.spec),
        ranks=collectives.world_size(),
    )


def load(world: TrainState, checkpoint: Path) -> None:
    """Take the state of one of this run's own checkpoints, which must be whole (`resuming.newest`)."""
    try:
        facts = manifest.read(checkpoint, hashes=False)
    except manifest.UnusableCheckpoint as unfit:
        raise UnreadableInput(f"{checkpoint} {unfit}") from None
    world.zero.load(checkpoint.parent, checkpoint.name, universal=facts.universal)
    world.step, world.optimizer_steps, world.skipped = facts.step, facts.updates, facts.skipped
    if world.teacher and world.teacher.moves:
        world.teacher.load_state(load_file(str(checkpoint / _teacher_file(world))))
    if world.prefetcher:
        world.prefetcher.read(checkpoint)
    own = checkpoint / streams_file(collectives.rank())
    if own.is_file():
        rng.restore(json.loads(own.read_text(encoding="utf-8")))
    else:  # a rank that the run did not have before it was converted
        rng.seed_all(world.spec.training.seed, collectives.rank(), world.step)


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0, the start model's, where there is none."""
    return max(
        (int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*")), default=0
    )


def save_model(world: TrainState, run: Path) -> Path:
    """The trained model as a Hugging Face folder: model/, and adapter/ beside it with LoRA; the first rank writes."""
    target, partial = run / "model", run / ".partial-model"
    first = collectives.rank() == 0
    with atomic.writing(partial, target):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            _write_settings(world, partial)
        _stream(world.student.named_tensors(), partial if first else None)
        if world.spec.model.lora:
            _save_adapter(world, run / "adapter" if first else None)
        if first:
            atomic.replace_folder(partial, target)
    return target


def check_saving(world: TrainState) -> None:
    """Write, to a folder that goes at once, all of model/ and adapter/ but the tensors.

    Raises BadData with the whole reason where the library refuses: before a step is taken, not after the last.
    """
    with tempfile.TemporaryDirectory(prefix="sdkit-save-") as folder:
        try:
            _write_settings(world, Path(folder))
            if world.spec.model.lora:
                model: Any = world.student.model
                model.peft_config[world.student.adapter].save_pretrained(folder)
        except OSError as error:
            raise BadEnvironment(f"cannot write to {folder}: {atomic.fault(error)}") from None
        except Exception as error:
            raise BadData(
                f"the trained model could not be saved: {one_line(error)}", path=("model", "path")
            ) from error


def _write_settings(world: TrainState, folder: Path) -> None:
    """The configuration, the generation settings and the tokenizer of a written model."""
    causal: Any = world.student.causal
    folder.mkdir(parents=True, exist_ok=True)
    causal.config.save_pretrained(folder)
    # As the checkpoint has them: the library loads settings that its own `save_pretrained` refuses to write.
    causal.generation_config.to_json_file(
        folder / "generation_config.json", keys_to_pop=["compile_config"]
    )
    world.data.tokenizer.save_pretrained(folder)


def _stream(tensors: Iterator[tuple[str, Tensor]], folder: Path | None) -> None:
    """Tensors as they come, in files of at most FILE_BYTES, with an index where these are several; None: go along."""
    held: dict[str, Tensor] = {}
    parts: list[Path] = []
    part_of: dict[str, int] = {}
    size = whole = 0

    def write(folder: Path) -> None:
        parts.append(folder / f"part-{len(parts)}.safetensors")
        save_file(held, str(parts[-1]), metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if folder is None:
            continue
        if held and size + tensor.nbytes > FILE_BYTES:
            write(folder)
            size = 0
        held[name], part_of[name] = tensor.contiguous().cpu(), len(parts)
        size, whole = size + tensor.nbytes, whole + tensor.nbytes
    if folder is None:
        return
    write(folder)
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return
    named = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, named, strict=True):
        part.rename(folder / name)
    index = {
        "metadata": {"total_size": whole},
        "weight_map": {name: named[part] for name, part in part_of.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _save_adapter(world: TrainState, folder: Path | None) -> None:
    model: Any = world.student.model
    mark = f".{world.student.adapter}."
    own = {name: p for name, p in model.named_parameters() if mark in name}
    with world.student.sharding.gather(list(own.values())):
        held = {name: p.detach() for name, p in own.items()}
    if folder is not None:
        adapters = [world.student.adapter]
        model.save_pretrained(str(folder), selected_adapters=adapters, state_dict=held)


def _forget_older(final: Path, keep: int) -> None:
    """Keep the newest up to `final`; what is later was passed over when the run was resumed before it."""
    found = sorted(final.parent.glob("step_*"))
    kept = [path for path in found if path <= final][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in final.parent.glob(".*-step_*"):
        shutil.rmtree(path, ignore_errors=True)
