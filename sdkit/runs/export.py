"""Exports a finished run as a Hugging Face folder with a model card.  Copies the run's files; imports no torch."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from sdkit.language.bundled import PREFIX
from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput
from sdkit.language.specs import ExperimentSpec, ModelSpec
from sdkit.runs import model_card
from sdkit.runs.directory import trained_model

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""The files of model/ other than the tokenizer's."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors")


def export(spec: ExperimentSpec, base: Path, run: Path, to: Path, *, merge: bool) -> str:
    """Write the run's model to the new folder `to`; for a LoRA run its adapter, unless `merge`.

    Returns a message that says what was written.  The folder appears once it is complete; tensors are the run's own
    files, bit for bit.  Raises UnreadableInput if `to` exists, the run has no model yet or no adapter to merge, BadData
    if weights are damaged, and BadEnvironment if the folder cannot be written.
    """
    model, adapter = trained_model(run), spec.model.lora is not None and not merge
    if merge and spec.model.lora is None:
        raise UnreadableInput(
            f"{run} trained all weights, so there is no adapter to merge", hint="leave out --merge-lora"
        )
    if to.exists() or to.is_symlink():
        raise UnreadableInput(f"{to} exists", hint="name another with --to")
    for weights in (run / "adapter" if adapter else model).glob("*.safetensors"):
        _check(weights)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}-{secrets.token_hex(4)}")
        partial.mkdir()  # with the umask's mode, unlike mkdtemp
        try:
            if adapter:
                _write_adapter(spec.model, base, run, partial)
            else:
                shutil.copytree(model, partial, dirs_exist_ok=True)
            card = model_card.write(spec, base, run, adapter=adapter)
            (partial / "README.md").write_text(card, encoding="utf-8")
            _publish(partial, to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, shutil.Error) as error:
        raise BadEnvironment(f"cannot write {to}: {getattr(error, 'strerror', None) or error}") from None
    return _message(spec, to, adapter)


def _write_adapter(spec: ModelSpec, base: Path, run: Path, folder: Path) -> None:
    """Write the adapter, the base it belongs to, and the tokenizer (with the chat template of the training)."""
    for name in ADAPTER:
        if not (run / "adapter" / name).is_file():
            raise BadData(f"{run / 'adapter'} has no {name}")
    shutil.copy2(run / "adapter" / ADAPTER[1], folder)
    config: dict[str, Any] = json.loads((run / "adapter" / ADAPTER_CONFIG).read_text("utf-8"))
    config |= {"base_model_name_or_path": model_card.base_of(spec, base), "revision": spec.revision}
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    model_files = shutil.ignore_patterns(*MODEL_FILES)
    shutil.copytree(run / "model", folder, dirs_exist_ok=True, ignore=model_files)


def _check(weights: Path) -> None:
    """Raise BadData if a safetensors file is truncated or is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadData(f"{weights} is damaged: {error}") from None


def _publish(partial: Path, to: Path) -> None:
    """Sync every file to the disk, then give the folder its name."""
    for path in [p for p in partial.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(to)


def _message(spec: ExperimentSpec, to: Path, adapter: bool) -> str:
    if not adapter:
        return f"wrote {to}: the model, {spec.model.dtype}"
    line = f"wrote {to}: the adapter of {spec.model.path}"
    if spec.model.quantized:
        line += (
            "\nfor the trained model, load the base in 4 bits (nf4, double quantization), or export with --merge-lora"
        )
    if spec.model.path.startswith(PREFIX):
        line += "\nonly sdkit can load that base by its name: --merge-lora writes a self-contained model"
    return line
