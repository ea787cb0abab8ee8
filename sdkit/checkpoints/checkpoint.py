"""Saves and loads checkpoints, and saves the trained model in Hugging Face format.

checkpoints/step_000010/  the state after ten rollout batches; the name appears only when it is complete
    MANIFEST.json                 origin (run, spec, ranks), step, updates, skipped, zero_stage, and every file's SHA-256
    random_rank_R.json            each rank's random generators
    teacher.safetensors           float32 averages of a moving teacher, by the student's parameter names (for a routed
                                  teacher prefixed with the route's number: `0/NAME`); under ZeRO-3 each rank's flat
                                  shards: teacher_rank_R.safetensors
    mp_rank_*, *zero_pp_rank_*    DeepSpeed's: student, masters, optimizer moments (pickles: only this run's own are read)
    ahead.jsonl                   prefetched rollouts, with rollout.max_staleness
    zero/NAME/                    in a converted checkpoint, in place of the ranks' files: a parameter's full master and moments
model/                    config, safetensors, tokenizer; with LoRA the adapter is merged into a copy
adapter/                  with LoRA, the adapter alone
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from attrs import define, frozen
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdkit import __version__
from sdkit.checkpoints import atomic, manifest, rng
from sdkit.checkpoints.manifest import Manifest, Origin
from sdkit.distributed import collectives
from sdkit.distributed.zero import Zero
from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput, one_line
from sdkit.language.specs import ExperimentSpec
from sdkit.models.teachers import Teacher
from sdkit.models.weights import Weights

TEACHER = "teacher.safetensors"
PREFETCHED = "ahead.jsonl"
"""The file of prefetched rollout batches."""
Part = Literal["optimizer", "teacher"]
"""A part of a checkpoint that another run can start with."""
MAX_FILE_BYTES = 5 * 10**9
"""Largest file of a saved model; the first rank holds at most this much of it in memory."""


@define(eq=False)
class Progress:
    """How far a run has come."""

    step: int = 0  # rollout batches trained on
    optimizer_steps: int = 0  # optimizer steps applied: the policy version
    skipped: int = 0  # optimizer steps in a row that were skipped

    def record(self, *, applied: bool) -> None:
        """Count an optimizer step."""
        self.optimizer_steps += applied
        self.skipped = 0 if applied else self.skipped + 1


class _StoredTensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is looked up."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = frozenset(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


class Prefetched(Protocol):
    """Rollout batches that are sampled and not yet trained on (train/prefetch.py)."""

    def wait(self) -> None: ...
    def write(self, folder: Path) -> None: ...
    def read(self, folder: Path) -> None: ...


@frozen(eq=False, kw_only=True)
class TrainState:
    """Everything that changes during a run; the random streams belong to the process (rng.py)."""

    zero: Zero  # the student and the optimizer
    teacher: Teacher | None
    prefetched: Prefetched | None
    progress: Progress


def save(state: TrainState, run: Path, spec: ExperimentSpec) -> Path:
    """Write a checkpoint of the current step and return its folder; the name appears only when everything is on disk.

    Older checkpoints are deleted afterwards.  Raises BadEnvironment if it cannot be written; older ones are then untouched.
    """
    if state.prefetched:
        state.prefetched.wait()
    folder = run / "checkpoints"
    tag = f"step_{state.progress.step:06d}"
    partial, final = folder / f".partial-{tag}", folder / tag
    with atomic.delete_partial_on_error(partial, final):
        _write_together(lambda: atomic.empty_folder(partial) if collectives.rank() == 0 else None)
        state.zero.save(folder, partial.name)
        averages = state.teacher.state() if state.teacher else {}
        _write_together(lambda: _write_rank_files(state, averages, partial))
        _write_manifest(state, manifest.origin(run, spec, collectives.world_size()), partial)
        if collectives.rank() == 0:
            atomic.replace_folder(partial, final)
            _delete_older(final, spec.output.keep_checkpoints)
        collectives.barrier()
    return final


def _write_together(write: Callable[[], None]) -> None:
    """Call `write` on every rank; if it fails on one with a disk error, all ranks raise OSError."""
    fault = None
    try:
        write()
    except Exception as error:
        if (fault := atomic.disk_error(error)) is None:
            raise
    if faults := [text for text in collectives.all_gather_object(fault) if text]:
        raise OSError(faults[0])


def _write_rank_files(state: TrainState, averages: Mapping[str, Tensor], folder: Path) -> None:
    """Write what DeepSpeed does not save: this rank's random state and its part of the teacher's averages."""
    generators = json.dumps(rng.state())
    (folder / rng_state_file(collectives.rank())).write_text(generators, encoding="utf-8")
    if averages and (collectives.rank() == 0 or state.zero.stage == 3):
        tensors = {name: t.contiguous() for name, t in averages.items()}
        save_file(tensors, folder / _teacher_file(state.zero))
        atomic.follow_umask(folder / _teacher_file(state.zero))
    if state.prefetched:
        state.prefetched.write(folder)


def rng_state_file(rank: int) -> str:
    """Name of the file with a rank's random state."""
    return f"random_rank_{rank}.json"


def teacher_shard_file(rank: int) -> str:
    """Name of the file with a rank's shards of the teacher's averages, under ZeRO-3."""
    return f"teacher_rank_{rank}.safetensors"


def _teacher_file(zero: Zero) -> str:
    return teacher_shard_file(collectives.rank()) if zero.stage == 3 else TEACHER


def _write_manifest(state: TrainState, origin: Origin, folder: Path) -> None:
    """Flush every file to disk and write the manifest; the ranks share the work of hashing."""
    names = collectives.broadcast_object(manifest.file_names(folder))
    own: dict[str, manifest.FileEntry] = {}

    def finish() -> None:
        for i in collectives.shard_indices(len(names)):
            atomic.fsync(folder / names[i])
            own[names[i]] = manifest.file_entry(folder / names[i])

    _write_together(finish)
    files = {name: file for part in collectives.all_gather_object(own) for name, file in part.items()}
    facts = Manifest(
        origin=origin,
        step=state.progress.step,
        updates=state.progress.optimizer_steps,
        skipped=state.progress.skipped,
        zero_stage=state.zero.stage,
        sdkit=__version__,
        files=dict(sorted(files.items())),
    )
    _write_together(lambda: manifest.write(folder, facts) if collectives.rank() == 0 else None)


def load(state: TrainState, checkpoint: Path, seed: int) -> None:
    """Load one of this run's own checkpoints, which must be intact (`resume.newest_checkpoint`).

    `seed` is the run's, for a rank that the checkpoint has no random state of.
    """
    facts = _load_optimizer(state, checkpoint)
    progress = state.progress
    progress.step, progress.optimizer_steps, progress.skipped = facts.step, facts.updates, facts.skipped
    _load_teacher(state, checkpoint)
    if state.prefetched:
        state.prefetched.read(checkpoint)
    own = checkpoint / rng_state_file(collectives.rank())
    if own.is_file():
        rng.restore(json.loads(own.read_text(encoding="utf-8")))
    else:  # a rank added by `sdkit checkpoint convert`
        rng.seed_all(seed, collectives.rank(), facts.step)


def load_parts(state: TrainState, checkpoint: Path, parts: Collection[Part]) -> None:
    """Load parts of an intact checkpoint of another run of the user's own: same shapes, ZeRO stage and ranks.

    `optimizer` includes the student's weights at the end of that run.  Progress and random streams stay as they are.
    """
    if "optimizer" in parts:
        _load_optimizer(state, checkpoint)
    if "teacher" in parts:
        _load_teacher(state, checkpoint)


def _load_optimizer(state: TrainState, checkpoint: Path) -> Manifest:
    try:
        facts = manifest.read(checkpoint, hashes=False)
    except manifest.UnusableCheckpoint as error:
        raise UnreadableInput(f"{checkpoint} {error}") from None
    state.zero.load(checkpoint.parent, checkpoint.name, universal=facts.universal)
    return facts


def _load_teacher(state: TrainState, checkpoint: Path) -> None:
    if state.teacher and state.teacher.moves:
        with safe_open(str(checkpoint / _teacher_file(state.zero)), framework="pt") as file:
            state.teacher.load_state(_StoredTensors(file))


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0, the start model, if there is none."""
    return max((int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*")), default=0)


def save_model(student: Weights, tokenizer: Any, run: Path) -> Path:
    """Write the trained model to model/ in Hugging Face format, with LoRA also adapter/; only the first rank writes."""
    target, partial = run / "model", run / ".partial-model"
    first = collectives.rank() == 0
    with atomic.delete_partial_on_error(partial, target):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            _write_settings(student, tokenizer, partial)
        _write_tensors(student.named_tensors(), partial if first else None)
        if student.has_adapters:
            _save_adapter(student, run / "adapter" if first else None)
        if first:
            atomic.replace_folder(partial, target)
    return target


def check_saving(student: Weights, tokenizer: Any) -> None:
    """Write all of model/ and adapter/ except the tensors to a temporary folder.

    Raises BadData with the full reason if the library refuses: before the first step rather than after the last.
    """
    with tempfile.TemporaryDirectory(prefix="sdkit-save-") as folder:
        try:
            _write_settings(student, tokenizer, Path(folder))
            if student.has_adapters:
                model: Any = student.model
                model.peft_config[student.adapter].save_pretrained(folder)
        except OSError as error:
            raise BadEnvironment(f"cannot write to {folder}: {atomic.disk_error(error)}") from None
        except Exception as error:
            raise BadData(
                f"the trained model could not be saved: {one_line(error)}", path=("model", "path")
            ) from error


def _write_settings(student: Weights, tokenizer: Any, folder: Path) -> None:
    """Write the model's configuration, generation settings and tokenizer."""
    causal = student.causal
    folder.mkdir(parents=True, exist_ok=True)
    causal.config.save_pretrained(folder)
    # Unchanged from the start model: transformers loads settings that its own `save_pretrained` refuses to write.
    causal.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path | None) -> None:
    """Write tensors as they arrive, in files of at most MAX_FILE_BYTES, with an index if there are several.

    With folder None the tensors are only consumed, as every rank must take part in gathering them.
    """
    pending: dict[str, Tensor] = {}
    parts: list[Path] = []
    part_of: dict[str, int] = {}
    size = total = 0

    def write(folder: Path) -> None:
        parts.append(folder / f"part-{len(parts)}.safetensors")
        save_file(pending, parts[-1], metadata={"format": "pt"})
        atomic.follow_umask(parts[-1])
        pending.clear()

    for name, tensor in tensors:
        if folder is None:
            continue
        if pending and size + tensor.nbytes > MAX_FILE_BYTES:
            write(folder)
            size = 0
        pending[name], part_of[name] = tensor.contiguous().cpu(), len(parts)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if folder is None:
        return
    write(folder)
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[part] for name, part in part_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _save_adapter(student: Weights, folder: Path | None) -> None:
    model: Any = student.model
    mark = f".{student.adapter}."
    adapter = {name: p for name, p in model.named_parameters() if mark in name}
    with student.sharding.gather(list(adapter.values())):
        tensors = {name: p.detach() for name, p in adapter.items()}
    if folder is not None:
        model.save_pretrained(str(folder), selected_adapters=[student.adapter], state_dict=tensors)
        for path in folder.glob("*.safetensors"):
            atomic.follow_umask(path)


def _delete_older(final: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `final`.

    Later ones are deleted too: they were passed over when the run was resumed from an earlier one.
    """
    checkpoints = sorted(final.parent.glob("step_*"))
    kept = [path for path in checkpoints if path <= final][-keep:]
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in final.parent.glob(".*-step_*"):
        shutil.rmtree(path, ignore_errors=True)
