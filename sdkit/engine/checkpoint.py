"""Write the world down, and take it up again; the trained model in Hugging Face format.

checkpoints/step_000010/   world.json  teacher.safetensors (under stage 3 each rank's pieces: teacher_rank_0.safetensors, …)
                           deepspeed files (pickles: only ever this run's own)
model/                     config, safetensors, tokenizer; with LoRA the adapter merged into a copy, and
adapter/                   the adapter alone
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.engine import ranks
from sdkit.problems import SdkitError, UnreadableInput

if TYPE_CHECKING:
    from sdkit.engine.world import World

WORLD = "world.json"
FILE_BYTES = 5 * 10**9
"""Of the largest file of a written model: what the first rank holds of it at once."""


def save(world: World, run: Path) -> Path:
    """A complete checkpoint of the world at its step; the name appears only when everything is written."""
    folder = run / "checkpoints"
    tag = f"step_{world.step:06d}"
    partial, final = folder / f".partial-{tag}", folder / tag
    first = ranks.rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.meet()
        world.zero.save(folder, partial.name)
        if first or world.plan.zero_stage == 3:
            _write_teacher(world, partial)
        if first:
            facts = {"step": world.step, "updates": world.updates, "skipped": world.skipped}
            (partial / WORLD).write_text(json.dumps(facts), encoding="utf-8")
        ranks.meet()
        if first:
            _to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _forget_older(folder, keep=final)
        ranks.meet()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SdkitError(f"cannot write {final}: {error.strerror or error}") from None
    return final


def _teacher_file(world: World) -> str:
    return (
        f"teacher_rank_{ranks.rank()}.safetensors"
        if world.plan.zero_stage == 3
        else "teacher.safetensors"
    )


def _write_teacher(world: World, folder: Path) -> None:
    """What DeepSpeed does not keep: the teacher's averages, of what this rank holds."""
    if world.teacher and (state := world.teacher.state()):
        held = {name: t.contiguous() for name, t in state.items()}
        save_file(held, str(folder / _teacher_file(world)))


def load(world: World, checkpoint: Path) -> None:
    """Take the state of one of this run's own checkpoints."""
    facts = json.loads((checkpoint / WORLD).read_text(encoding="utf-8"))
    world.zero.load(checkpoint.parent, checkpoint.name)
    world.step, world.updates, world.skipped = facts["step"], facts["updates"], facts["skipped"]
    if world.teacher and world.teacher.moves:
        world.teacher.load_state(load_file(str(checkpoint / _teacher_file(world))))


def newest(run: Path) -> Path:
    """The latest complete checkpoint of a run.  Raises UnreadableInput where there is none."""
    complete = sorted(p for p in (run / "checkpoints").glob("step_*") if (p / WORLD).is_file())
    if not complete:
        raise UnreadableInput(
            f"{run} has no checkpoint to resume from",
            hint="set output.checkpoint_every, or start again with --overwrite",
        )
    return complete[-1]


def save_model(world: World, run: Path) -> Path:
    """The trained model as a Hugging Face folder: model/, and adapter/ beside it with LoRA; the first rank writes."""
    causal: Any = world.student.causal
    target, partial = run / "model", run / ".partial-model"
    first = ranks.rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            causal.config.save_pretrained(partial)
            causal.generation_config.save_pretrained(partial)
            world.data.tokenizer.save_pretrained(partial)
        _stream(world.student.tensors(), partial if first else None)
        if world.spec.model.lora:
            _save_adapter(world, run / "adapter" if first else None)
        if first:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SdkitError(f"cannot write {target}: {error.strerror or error}") from None
    return target


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


def _save_adapter(world: World, folder: Path | None) -> None:
    model: Any = world.student.model
    mark = f".{world.student.adapter}."
    own = {name: p for name, p in model.named_parameters() if mark in name}
    with world.student.shards.gathered(list(own.values())):
        held = {name: p.detach() for name, p in own.items()}
    if folder is not None:
        adapters = [world.student.adapter]
        model.save_pretrained(str(folder), selected_adapters=adapters, state_dict=held)


def _to_disk(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _forget_older(folder: Path, keep: Path) -> None:
    for path in folder.glob("step_*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
