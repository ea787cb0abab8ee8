"""What the tables of other trainers' configurations compute: batch sizes, lengths, templates, data files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]
"""The peer's keys, joined by dots, and their values, defaults included."""


def _generation_rows(config: Config) -> int:
    """The completions that TRL samples at once, over all processes."""
    at_once = config["per_device_train_batch_size"] * config["processes"]
    steps = config.get("steps_per_generation") or config["gradient_accumulation_steps"]
    return config.get("generation_batch_size") or at_once * steps


def _trl_prompts(value: Any, config: Config) -> int:
    return max(1, _generation_rows(config) // config["num_generations"])


def _trl_updates(value: Any, config: Config) -> int:
    rows = config["per_device_train_batch_size"] * config["processes"] * config["gradient_accumulation_steps"]
    return max(1, _generation_rows(config) // rows)


def _trl_steps(value: Any, config: Config) -> int | None:
    return None if value <= 0 else max(1, value // _trl_updates(None, config))


def _verl_updates(value: Any, config: Config) -> int:
    return max(1, config["data.train_batch_size"] // value)


def _wrap(value: str, config: Config) -> str:
    """A template with its own field as sdkit's `{value}`."""
    return value.replace("{successful_previous_attempt}", "{value}").replace("{feedback_raw}", "{value}")


def _context_template(value: str, config: Config) -> str:
    """The template of the teacher's prompt, without the fields that are not filled."""
    shows = {
        "solution": config.get("use_successful_as_teacher", True),
        "feedback": next((config[key] for key in config if key.endswith("include_environment_feedback")), False),
    }
    for field, shown in shows.items():
        value = value if shown else value.replace(f"{{{field}}}", "")
    return value


def _data_file(value: Any, config: Config) -> dict[str, Any] | None:
    """The source of a data file, or of the first of several."""
    file = value[0] if isinstance(value, list) and value else value
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "jsonl"}
    kind = kinds.get(os.path.splitext(str(file))[1])
    return {"kind": kind, "path": file, "origin": "the configuration"} if kind else None


ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
FORMULAS: Mapping[str, tuple[Callable[[Any, Config], Any], Sequence[str]]] = {
    "trl_prompts": (_trl_prompts, (*ROWS, "num_generations")),
    "trl_updates": (_trl_updates, ROWS),
    "trl_steps": (_trl_steps, ROWS),
    "verl_updates": (_verl_updates, ("data.train_batch_size",)),
    "wrap": (_wrap, ()),
    "context_template": (_context_template, ()),
    "data_file": (_data_file, ()),
}
"""What a rule computes: name → the function of the value and all keys, and the keys that it reads."""
