"""Loads the model and tokenizer that a spec names, attaches adapters, and converts bundled models once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdkit.language.bundled import BUNDLED, PREFIX, local_folder
from sdkit.language.errors import BadData, BadEnvironment, first_line
from sdkit.language.files import library_reads
from sdkit.language.rules.base import IS_ADAPTER, IS_QUANTIZED, MERGE_FIRST, UNQUANTIZED
from sdkit.language.specs import ExternalWeights, ModelSpec, VllmServerBackend
from sdkit.language.vocabulary import first_difference
from sdkit.models import activation_checkpointing, attention, lora, quantization
from sdkit.stdout import quiet

CONFIG = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ReadWeights = Callable[[ModelSpec, str], nn.Module]
"""Returns the model in a folder or under a hub id, without adapters."""


def cache_folder() -> Path:
    """Returns the folder for converted models: $SDKIT_CACHE, or sdkit/ in the user's cache folder."""
    configured = os.environ.get("SDKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(configured) if configured else base / "sdkit"


def resolve_model(path: str, base: Path) -> str:
    """Returns a folder or hub id that both `from_pretrained` and vLLM accept."""
    if path.startswith(PREFIX):
        return str(_bundled_folder(path.removeprefix(PREFIX)))
    return str(local_folder(path, base) or path)


def hub_commit(path: str, revision: str | None) -> str | None:
    """Returns the commit of a model of the hub that this machine has loaded; None if its cache has none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, CONFIG, revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def load_tokenizer(spec: ModelSpec | ExternalWeights, located: str) -> Any:
    """Returns the tokenizer, without running the model's own code.  Raises BadData if there is none."""
    from transformers import AutoTokenizer

    try:
        with library_reads(f"no tokenizer in {located}"):
            return AutoTokenizer.from_pretrained(located, revision=spec.revision, trust_remote_code=False)
    except BadData:
        if Path(located, CONFIG).is_file():
            _config(
                spec, located
            )  # raises if config.json is the damaged file: transformers reads it for the tokenizer
        raise


def fixed_date(tokenizer: Any, now: datetime) -> dict[str, Any]:
    """Returns the argument that makes a chat template print the date `now`; no argument if it prints none."""
    return {"strftime_now": now.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}


def load_config(spec: ModelSpec, located: str) -> dict[str, Any]:
    """Returns the model's `config.json` with defaults filled in.  Raises BadData if it cannot be read."""
    return _config(spec, located).to_dict()


def check_unquantized(spec: ModelSpec, located: str) -> None:
    """Raise BadData if the model's weights are stored quantized: they cannot be trained."""
    if getattr(_config(spec, located), "quantization_config", None):
        raise BadData(f"{located} {IS_QUANTIZED}", hint=UNQUANTIZED)


def embedding_rows(spec: ModelSpec | ExternalWeights, located: str) -> int | None:
    """Returns the number of token embeddings in the model's configuration.  Raises BadData as `load_config` does."""
    return getattr(_config(spec, located).get_text_config(), "vocab_size", None)


def _config(spec: ModelSpec | ExternalWeights, located: str) -> Any:
    from transformers import AutoConfig

    path = Path(located, CONFIG)
    with library_reads(f"{path} cannot be read" if path.is_file() else f"no model in {located}"):
        return AutoConfig.from_pretrained(located, revision=spec.revision, trust_remote_code=False)


def weights_folder(backend: VllmServerBackend, base: Path) -> Path:
    """Returns the folder in which the trainer hands weight files to rollout servers."""
    return (base / backend.folder).resolve() if backend.folder else cache_folder() / "weights"


def check_vocabulary(student: Any, other: Any, path: str) -> None:
    """Raise BadData if the model in `path` gives a token another id than the student does."""
    if difference := first_difference(student.get_vocab(), other.get_vocab()):
        raise BadData(
            f"the model {path} has another vocabulary than the student: {difference}",
            hint="distributions are compared id by id: take a model with the student's tokenizer",
        )


def load_model(spec: ModelSpec, located: str, seed: int, read: ReadWeights | None = None) -> nn.Module:
    """Returns the causal language model in the spec's dtype, with adapters (initialized from `seed`) if it has any.

    `read` returns the model without adapters (default: `read_weights`).  Raises BadData if the weights cannot be read, and
    BadEnvironment if a package is missing.
    """
    attention.install()
    if spec.quantized:
        quantization.check_installed()
    model: Any = (read or read_weights)(spec, located)
    if spec.quantized:
        quantization.quantize(model)
    if spec.activation_checkpointing:
        activation_checkpointing.enable(model)
    if spec.lora:
        model = lora.attach(model, spec.lora, seed)
    # Never in training mode: dropout and noise would change importance ratios and recomputed activations.
    model.eval()
    return model


def build_without_weights(spec: ModelSpec, located: str) -> nn.Module:
    """Returns the causal language model in the spec's dtype on the `meta` device, without reading its weights."""
    from transformers import AutoModelForCausalLM

    config, kind = _config(spec, located), DTYPES[spec.dtype]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=kind, attn_implementation=spec.attn_implementation, trust_remote_code=False
        )


def read_weights(spec: ModelSpec, located: str) -> nn.Module:
    """Returns the causal language model in the spec's dtype, in host memory.

    Raises BadData if the weights cannot be read; pickled weights are refused.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    from transformers.utils.peft_utils import find_adapter_config_file

    logging.disable_progress_bar()
    with library_reads(f"cannot load {located}"):
        if find_adapter_config_file(located, revision=spec.revision) is not None:
            # transformers would load its base model and apply the adapter.
            raise BadData(f"{located} {IS_ADAPTER}", hint=MERGE_FIRST)
        try:
            return AutoModelForCausalLM.from_pretrained(
                located,
                revision=spec.revision,
                dtype=DTYPES[spec.dtype],
                attn_implementation=spec.attn_implementation,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except ImportError as error:
            if spec.attn_implementation != "flash_attention_2":
                raise
            raise BadData(
                f"flash_attention_2 does not run here: {first_line(error)}",
                hint="install flash-attn, or set model.attn_implementation: sdpa",
                path=("model", "attn_implementation"),
            ) from None
        except ValueError as error:
            if spec.attn_implementation == "eager" or 'attn_implementation="eager"' not in str(error):
                raise
            raise BadData(
                f"the model has no {spec.attn_implementation} attention",
                hint="set model.attn_implementation: eager",
                path=("model", "attn_implementation"),
            ) from None


def _bundled_folder(name: str) -> Path:
    """Returns the folder of a bundled model, which is converted from its package on first use."""
    entry = BUNDLED[name]
    target = cache_folder() / f"{name}-{entry.revision}"
    if (target / CONFIG).is_file():
        return target
    package = importlib.util.find_spec(entry.package)
    if package is None or not package.submodule_search_locations:
        raise BadEnvironment(f"the package {entry.package} is not installed", hint=f"install the extra {entry.extra}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        with quiet(progress=False):  # may be the first import of DeepSpeed, which prints to stdout
            _convert(Path(package.submodule_search_locations[0]), entry.file, partial)
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        if not (target / CONFIG).is_file():  # otherwise another process finished first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(package: Path, file: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # The weights are dequantized here, so the saved model must not be marked as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def end_ids(model: Any, tokenizer: Any, turn_end: int | None = None) -> tuple[int, ...]:
    """Returns the token ids that end a completion, without duplicates.

    First the end of a turn (`turn_end`), then the tokenizer's end token, then those of the model's generation config.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ids = [i for i in [turn_end, tokenizer.eos_token_id, *listed] if i is not None]
    if not ids:
        raise BadData("neither the tokenizer nor the model names an end token")
    return tuple(dict.fromkeys(ids))


def special_ids(tokenizer: Any, ends: tuple[int, ...]) -> frozenset[int]:
    """Returns the ids of tokens that mark up the chat format rather than text, end tokens included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {i for i, token in added.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | marked | set(ends)
