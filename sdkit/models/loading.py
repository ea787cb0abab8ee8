"""Load the model and the tokenizer that a spec names; attach adapters; convert the bundled model once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdkit.language.bundled import BUNDLED, PREFIX
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.files import library_reads
from sdkit.language.rules.base import IS_ADAPTER, MERGE_FIRST
from sdkit.language.specs import ExternalWeights, ModelSpec, VllmServerBackend
from sdkit.language.vocabulary import first_difference
from sdkit.models import activation_checkpointing, lora
from sdkit.stdout import quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cache_folder() -> Path:
    """Where converted models are kept: $SDKIT_CACHE, or sdkit/ in the user's cache folder."""
    named = os.environ.get("SDKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "sdkit"


def resolve_model(path: str, base: Path) -> str:
    """A folder, or a hub id, that `from_pretrained` and vLLM both take."""
    if path.startswith(PREFIX):
        return str(_bundled(path.removeprefix(PREFIX)))
    local = (base / path).resolve()
    return str(local) if local.is_dir() else path


def load_tokenizer(spec: ModelSpec | ExternalWeights, located: str) -> Any:
    """The tokenizer, without any code of the model's own."""
    from transformers import AutoTokenizer

    with library_reads(f"no tokenizer in {located}"):
        return AutoTokenizer.from_pretrained(
            located, revision=spec.revision, trust_remote_code=False
        )


def load_config(spec: ModelSpec, located: str) -> dict[str, Any]:
    """The model's `config.json`, every default filled in.  Raises BadData where it cannot be read."""
    return _config(spec, located).to_dict()


def embedding_rows(spec: ModelSpec | ExternalWeights, located: str) -> int | None:
    """How many token ids the model has embeddings for, by its configuration.  Raises BadData as `load_config` does."""
    return getattr(_config(spec, located).get_text_config(), "vocab_size", None)


def _config(spec: ModelSpec | ExternalWeights, located: str) -> Any:
    from transformers import AutoConfig

    with library_reads(f"no model in {located}"):
        return AutoConfig.from_pretrained(located, revision=spec.revision, trust_remote_code=False)


def weights_folder(backend: VllmServerBackend, base: Path) -> Path:
    """Where weight files pass from the trainer to rollout servers."""
    return (base / backend.folder).resolve() if backend.folder else cache_folder() / "weights"


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """Every token with its id, added ones among them."""
    return tokenizer.get_vocab()


def check_vocabulary(student: Any, other: Any, path: str) -> None:
    """Raise BadData where the model in `path` gives some token another id than the student."""
    ours, theirs = vocabulary(student), vocabulary(other)
    if difference := first_difference(ours, theirs):
        raise BadData(
            f"the model {path} has another vocabulary than the student: {difference}",
            hint="distributions are compared id by id: take a model with the student's tokenizer",
        )


def load_model(spec: ModelSpec, located: str, seed: int) -> nn.Module:
    """The causal language model in the spec's precision, with adapters (drawn from `seed`) where it asks for them.

    Raises BadData where the weights cannot be read (pickled weights are refused).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with library_reads(f"cannot load {located}"):
        _refuse_adapter(spec, located)
        with _hint_at_eager(spec):
            model: Any = AutoModelForCausalLM.from_pretrained(
                located,
                revision=spec.revision,
                dtype=DTYPES[spec.dtype],
                attn_implementation=spec.attention,
                trust_remote_code=False,
                use_safetensors=True,
            )
    if spec.activation_checkpointing:
        activation_checkpointing.enable(model)
    if spec.lora:
        model = lora.attach(model, spec.lora, seed)
    # Never in training mode: dropout and noise would make ratios and recomputed activations differ.
    model.eval()
    return model


@contextlib.contextmanager
def _hint_at_eager(spec: ModelSpec) -> Iterator[None]:
    """transformers names a setting of its own where a model has not the attention kernel that is asked for."""
    try:
        yield
    except ValueError as error:
        if spec.attention == "eager" or 'attn_implementation="eager"' not in str(error):
            raise
        raise BadData(
            f"the model has no {spec.attention} attention",
            hint="set model.attention: eager",
            path=("model", "attention"),
        ) from None


def _refuse_adapter(spec: ModelSpec, located: str) -> None:
    """transformers would open the adapter's base model and put the adapter on it."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(located, revision=spec.revision) is not None:
        raise BadData(f"{located} {IS_ADAPTER}", hint=MERGE_FIRST)


def _bundled(name: str) -> Path:
    """The folder of a bundled model, converted from its package the first time."""
    entry = BUNDLED[name]
    target = cache_folder() / f"{name}-{entry.revision}"
    if (target / "config.json").is_file():
        return target
    found = importlib.util.find_spec(entry.package)
    if found is None or not found.submodule_search_locations:
        raise BadEnvironment(
            f"the package {entry.package} is not installed", hint=f"install the extra {entry.extra}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        with quiet():  # the first to import DeepSpeed, which speaks on stdout
            _convert(Path(found.submodule_search_locations[0]), entry.file, partial)
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(package: Path, file: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # The dequantised weights are plain tensors; what marks them as quantised must not reach the folder.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def end_ids(model: Any, tokenizer: Any, turn_end: int | None = None) -> tuple[int, ...]:
    """Token ids that end a completion: that of a turn (`turn_end`, the first), the tokenizer's, and those of the model's
    generation settings.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    ids = [i for i in [turn_end, tokenizer.eos_token_id, *listed] if i is not None]
    if not ids:
        raise BadData("neither the tokenizer nor the model names an end token")
    return tuple(dict.fromkeys(ids))


def special_ids(tokenizer: Any, ends: tuple[int, ...]) -> frozenset[int]:
    """Token ids that are marks of the chat's format and no text, end tokens among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {i for i, token in added.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | marked | set(ends)
