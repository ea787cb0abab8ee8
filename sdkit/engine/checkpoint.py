"""Write the world down, and take it up again; the trained model in Hugging Face format.

checkpoints/step_000010/   world.json  teacher.safetensors  deepspeed files (pickles: only ever this run's own)
model/                     config, safetensors, tokenizer; with LoRA the adapter merged into a copy, and
adapter/                   the adapter alone
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from sdkit.engine import ranks
from sdkit.problems import SdkitError, UnreadableInput

if TYPE_CHECKING:
    from sdkit.engine.world import World

WORLD = "world.json"
TEACHER = "teacher.safetensors"


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
        if first:
            _rest(world, partial)
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


def _rest(world: World, partial: Path) -> None:
    """What DeepSpeed does not keep."""
    if world.teacher and (state := world.teacher.state()):
        save_file({name: t.contiguous() for name, t in state.items()}, str(partial / TEACHER))
    facts = {"step": world.step, "updates": world.updates, "skipped": world.skipped}
    (partial / WORLD).write_text(json.dumps(facts), encoding="utf-8")


def load(world: World, checkpoint: Path) -> None:
    """Take the state of one of this run's own checkpoints."""
    facts = json.loads((checkpoint / WORLD).read_text(encoding="utf-8"))
    world.zero.load(checkpoint.parent, checkpoint.name)
    world.step, world.updates, world.skipped = facts["step"], facts["updates"], facts["skipped"]
    if world.teacher and world.teacher.moves:
        world.teacher.load_state(load_file(str(checkpoint / TEACHER)))


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
    if ranks.rank():
        return target
    shutil.rmtree(partial, ignore_errors=True)
    tensors = {name: t.contiguous().cpu() for name, t in world.student.tensors()}
    try:
        causal.config.save_pretrained(partial)
        causal.generation_config.save_pretrained(partial)
        save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
        world.data.tokenizer.save_pretrained(partial)
        if world.spec.model.lora:
            model: Any = world.student.model
            model.save_pretrained(str(run / "adapter"), selected_adapters=[world.student.adapter])
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SdkitError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _to_disk(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _forget_older(folder: Path, keep: Path) -> None:
    for path in folder.glob("step_*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
