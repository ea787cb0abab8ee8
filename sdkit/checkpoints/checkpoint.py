"""Write the state down, and take it up again; the trained model in Hugging Face format.

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
MAX_FILE_BYTES = 5 * 10**9
"""Of the largest file of a written model: what the first rank holds of it at once."""


def save(state: TrainState, run: Path) -> Path:
    """A complete checkpoint of the state at its step; its name appears only when everything is on disk.

    Older ones go afterwards.  Raises BadEnvironment where it cannot be written: then they are as they were.
    """
    if state.prefetcher:
        state.prefetcher.wait(state)
    folder = run / "checkpoints"
    tag = f"step_{state.step:06d}"
    partial, final = folder / f".partial-{tag}", folder / tag
    with atomic.delete_partial_on_error(partial, final):
        _write_together(lambda: atomic.empty_folder(partial) if collectives.rank() == 0 else None)
        state.zero.save(folder, partial.name)
        _write_together(lambda: _write_rank_files(state, partial))
        _write_manifest(state, run, partial)
        if collectives.rank() == 0:
            atomic.replace_folder(partial, final)
            _delete_older(final, state.spec.output.keep_checkpoints)
        collectives.barrier()
    return final


def _write_together(write: Callable[[], None]) -> None:
    """Write on every rank; where one of them cannot, all raise OSError."""
    fault = None
    try:
        write()
    except Exception as error:
        if (fault := atomic.disk_error(error)) is None:
            raise
    if faults := [found for found in collectives.all_gather_object(fault) if found]:
        raise OSError(faults[0])


def _write_rank_files(state: TrainState, folder: Path) -> None:
    """What DeepSpeed does not keep: random streams, and the teacher's averages, of what this rank holds."""
    held = json.dumps(rng.state())
    (folder / rng_state_file(collectives.rank())).write_text(held, encoding="utf-8")
    if collectives.rank() == 0 or state.plan.zero_stage == 3:
        if state.teacher and (averages := state.teacher.state()):
            tensors = {name: t.contiguous() for name, t in averages.items()}
            save_file(tensors, str(folder / _teacher_file(state)))
    if state.prefetcher:
        state.prefetcher.write(folder)


def rng_state_file(rank: int) -> str:
    """Where a rank's random streams are."""
    return f"random_rank_{rank}.json"


def teacher_shard_file(rank: int) -> str:
    """Where a rank's pieces of the teacher's averages are, under stage 3."""
    return f"teacher_rank_{rank}.safetensors"


def _teacher_file(state: TrainState) -> str:
    return teacher_shard_file(collectives.rank()) if state.plan.zero_stage == 3 else TEACHER


def _write_manifest(state: TrainState, run: Path, folder: Path) -> None:
    """Bring every file to the disk and name it in the manifest; the files are dealt out to the ranks."""
    names = collectives.broadcast_object(manifest.file_names(folder))
    own: dict[str, manifest.FileEntry] = {}

    def finish() -> None:
        for i in collectives.shard_indices(len(names)):
            atomic.fsync(folder / names[i])
            own[names[i]] = manifest.file_entry(folder / names[i])

    _write_together(finish)
    files = {
        name: file for part in collectives.all_gather_object(own) for name, file in part.items()
    }
    found = Manifest(
        origin=_origin(state, run),
        step=state.step,
        updates=state.optimizer_steps,
        skipped=state.skipped,
        zero_stage=state.plan.zero_stage,
        sdkit=__version__,
        files=dict(sorted(files.items())),
    )
    _write_together(lambda: manifest.write(folder, found) if collectives.rank() == 0 else None)


def _origin(state: TrainState, run: Path) -> Origin:
    """Which run, spec and number of ranks this is."""
    return Origin(
        run=directory.provenance(run).get("run"),
        spec=manifest.spec_digest(state.spec),
        ranks=collectives.world_size(),
    )


def load(state: TrainState, checkpoint: Path) -> None:
    """Take the state of one of this run's own checkpoints, which must be whole (`resuming.newest`)."""
    try:
        facts = manifest.read(checkpoint, hashes=False)
    except manifest.UnusableCheckpoint as unfit:
        raise UnreadableInput(f"{checkpoint} {unfit}") from None
    state.zero.load(checkpoint.parent, checkpoint.name, universal=facts.universal)
    state.step, state.optimizer_steps, state.skipped = facts.step, facts.updates, facts.skipped
    if state.teacher and state.teacher.moves:
        state.teacher.load_state(load_file(str(checkpoint / _teacher_file(state))))
    if state.prefetcher:
        state.prefetcher.read(checkpoint)
    own = checkpoint / rng_state_file(collectives.rank())
    if own.is_file():
        rng.restore(json.loads(own.read_text(encoding="utf-8")))
    else:  # a rank that the run did not have before it was converted
        rng.seed_all(state.spec.training.seed, collectives.rank(), state.step)


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0, the start model's, where there is none."""
    return max(
        (int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*")), default=0
    )


def save_model(state: TrainState, run: Path) -> Path:
    """The trained model as a Hugging Face folder: model/, and adapter/ beside it with LoRA; the first rank writes."""
    target, partial = run / "model", run / ".partial-model"
    first = collectives.rank() == 0
    with atomic.delete_partial_on_error(partial, target):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            _write_settings(state, partial)
        _write_tensors(state.student.named_tensors(), partial if first else None)
        if state.spec.model.lora:
            _save_adapter(state, run / "adapter" if first else None)
        if first:
            atomic.replace_folder(partial, target)
    return target


def check_saving(state: TrainState) -> None:
    """Write, to a folder that goes at once, all of model/ and adapter/ but the tensors.

    Raises BadData with the whole reason where the library refuses: before a step is taken, not after the last.
    """
    with tempfile.TemporaryDirectory(prefix="sdkit-save-") as folder:
        try:
            _write_settings(state, Path(folder))
            if state.spec.model.lora:
                model: Any = state.student.model
                model.peft_config[state.student.adapter].save_pretrained(folder)
        except OSError as error:
            raise BadEnvironment(f"cannot write to {folder}: {atomic.disk_error(error)}") from None
        except Exception as error:
            raise BadData(
                f"the trained model could not be saved: {one_line(error)}", path=("model", "path")
            ) from error


def _write_settings(state: TrainState, folder: Path) -> None:
    """The configuration, the generation settings and the tokenizer of a written model."""
    causal: Any = state.student.causal
    folder.mkdir(parents=True, exist_ok=True)
    causal.config.save_pretrained(folder)
    # As the checkpoint has them: the library loads settings that its own `save_pretrained` refuses to write.
    causal.generation_config.to_json_file(
        folder / "generation_config.json", keys_to_pop=["compile_config"]
    )
    state.data.tokenizer.save_pretrained(folder)


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path | None) -> None:
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
        if held and size + tensor.nbytes > MAX_FILE_BYTES:
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


def _save_adapter(state: TrainState, folder: Path | None) -> None:
    model: Any = state.student.model
    mark = f".{state.student.adapter}."
    own = {name: p for name, p in model.named_parameters() if mark in name}
    with state.student.sharding.gather(list(own.values())):
        held = {name: p.detach() for name, p in own.items()}
    if folder is not None:
        adapters = [state.student.adapter]
        model.save_pretrained(str(folder), selected_adapters=adapters, state_dict=held)


def _delete_older(final: Path, keep: int) -> None:
    """Keep the newest up to `final`; what is later was passed over when the run was resumed before it."""
    found = sorted(final.parent.glob("step_*"))
    kept = [path for path in found if path <= final][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in final.parent.glob(".*-step_*"):
        shutil.rmtree(path, ignore_errors=True)
