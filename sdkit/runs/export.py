"""A finished run as a Hugging Face folder with a model card.  Copies what the run wrote; loads no torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sdkit.language.bundled import PREFIX
from sdkit.runs import model_card
from sdkit.runs.directory import trained
from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput
from sdkit.language.specs import ExperimentSpec, ModelSpec

OF_THE_MODEL = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""What model/ holds besides the tokenizer."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors")


def export(spec: ExperimentSpec, base: Path, run: Path, to: Path, *, merge: bool) -> str:
    """Write the run's model to the new folder `to`, or its adapter where it trained one and `merge` is not asked for.

    The folder appears when it is complete; tensors are the run's own files, bit for bit.  Returns what was written, in
    words.  Raises UnreadableInput where `to` exists or the run has no such thing, BadData where weights are damaged and
    BadEnvironment where the disk refuses.
    """
    model, adapter = trained(run), spec.model.lora is not None and not merge
    if merge and spec.model.lora is None:
        raise UnreadableInput(
            f"{run} trained all weights, so there is no adapter to merge",
            hint="leave out --merge-lora",
        )
    if to.exists() or to.is_symlink():
        raise UnreadableInput(f"{to} exists", hint="name another with --to")
    for weights in (run / "adapter" if adapter else model).glob("*.safetensors"):
        _check(weights)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        try:
            if adapter:
                _write_adapter(spec.model, base, run, partial)
            else:
                shutil.copytree(model, partial, dirs_exist_ok=True)
            card = model_card.write(spec, base, run, adapter=adapter)
            (partial / "README.md").write_text(card, encoding="utf-8")
            _finish(partial, to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, shutil.Error) as error:
        raise BadEnvironment(
            f"cannot write {to}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return _told(spec, to, adapter)


def _write_adapter(spec: ModelSpec, base: Path, run: Path, folder: Path) -> None:
    """The adapter under its own base, and the tokenizer (whose chat template the run trained with)."""
    for name in ADAPTER:
        if not (run / "adapter" / name).is_file():
            raise BadData(f"{run / 'adapter'} has no {name}")
    shutil.copy2(run / "adapter" / ADAPTER[1], folder)
    config: dict[str, Any] = json.loads((run / "adapter" / ADAPTER_CONFIG).read_text("utf-8"))
    config |= {"base_model_name_or_path": model_card.base_of(spec, base), "revision": spec.revision}
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    skipped = shutil.ignore_patterns(*OF_THE_MODEL)
    shutil.copytree(run / "model", folder, dirs_exist_ok=True, ignore=skipped)


def _check(weights: Path) -> None:
    """Raise BadData where a file of tensors is cut short or is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadData(f"{weights} is damaged: {error}") from None


def _finish(partial: Path, to: Path) -> None:
    """Everything on the disk, then the name."""
    for path in [p for p in partial.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.chmod(0o755)
    partial.rename(to)


def _told(spec: ExperimentSpec, to: Path, adapter: bool) -> str:
    if not adapter:
        return f"wrote {to}: the model, {spec.model.dtype}"
    line = f"wrote {to}: the adapter of {spec.model.path}"
    if spec.model.path.startswith(PREFIX):
        line += "\nno library but sdkit finds that base by its name: --merge-lora writes a model that stands alone"
    return line
