"""Keys and values of the language that took the name that other libraries use.  Knows no spec class."""

from __future__ import annotations

from collections.abc import Mapping

from sdkit.language.errors import Path, spelled

RENAMED: Mapping[str, tuple[str, str | None]] = {
    "model.attention": ("attn_implementation", "transformers"),
    "model.chat_template_options": ("chat_template_kwargs", "transformers"),
    "model.lora.rank": ("r", "PEFT"),
    "model.lora.alpha": ("lora_alpha", "PEFT"),
    "model.lora.targets": ("target_modules", "PEFT"),
    "model.lora.target_modules=all_linear": ("all-linear", "PEFT"),
    "model.shape.hidden": ("hidden_size", "config.json"),
    "model.shape.layers": ("num_hidden_layers", "config.json"),
    "model.shape.vocabulary": ("vocab_size", "config.json"),
    "model.shape.context": ("max_position_embeddings", "config.json"),
    "optimizer.clip": ("max_grad_norm", "transformers"),
    "optimizer.schedule": ("lr_scheduler_type", "transformers"),
    "output.tensorboard": ("trackers", None),
    "rewards.*.batch_rows": ("batch_size", "transformers"),
    "rollout.backend.batch_rows": ("batch_size", "transformers"),
    "rollout.backend.cache_gib": ("kv_cache_gib", None),
    "rollout.backend.gpu_share": ("gpu_memory_utilization", "vLLM"),
    "rollout.backend.max_rows": ("max_num_seqs", "vLLM"),
}
"""Old key, or `key=value` for a value → its new name, and where that comes from.  `*` is the name of any reward."""


def current_name(path: Path, value: str | None = None) -> str | None:
    """Returns the name that the last key of `path`, or a value at `path`, has today; None if it has no other."""
    return _entry(path, value)[0]


def current_value(path: Path, value: object) -> object:
    """Returns what a value at the current name `path` is today, if the key had another type under its old name."""
    if path == ("output", "trackers") and isinstance(value, bool):
        return ["tensorboard"] if value else []
    return value


def rename_hint(path: Path, value: str | None = None) -> str | None:
    """Returns a hint that names the new name, as `current_name` does."""
    new, origin = _entry(path, value)
    return new and f'renamed to "{new}"' + (f", as in {origin}" if origin else "")


def _entry(path: Path, value: str | None) -> tuple[str | None, str | None]:
    if path[:1] == ("rewards",) and len(path) > 1:
        path = ("rewards", "*", *path[2:])
    return RENAMED.get(spelled(path) + ("" if value is None else f"={value}"), (None, None))
