"""Writes the spec of a shape and reads the steps of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tools.bench.inputs import TEMPLATES
from tools.bench.shapes import Shape, Side

SUPPORTS: dict[str, dict[str, Any]] = {
    "vocabulary": {"kind": "vocabulary"},
    "top_k": {"kind": "top_k", "k": 100, "chosen_by": "student", "remainder": "tail_bucket"},
    "sampled_token": {"kind": "sampled_token"},
}


def write_spec(shape: Shape, side: Side, model: Path, rows: Path, path: Path) -> None:
    """Write the run file with the objective, batch, optimizer and templates that TRL is given."""
    shows_demonstration = shape.trainer == "sdft"
    stage = 0 if shape.ranks == 1 and shape.dtype == "float32" else 1  # as `sdkit plan` advises
    spec: dict[str, Any] = {
        "model": {"path": str(model), "dtype": shape.dtype},
        "data": {
            "source": {"kind": "jsonl", "path": str(rows)},
            "columns": {"prompt": "prompt", "demonstration": "demonstration"},
        },
        "rollout": {
            "completions_per_prompt": shape.group,
            "max_new_tokens": shape.max_new_tokens,
            "max_prompt_tokens": 2048,
            "backend": "vllm" if side == "sdkit, vLLM" else "transformers",
        },
        "teacher": {
            "weights": {"kind": "ema", "update_rate": 0.01 if shows_demonstration else 0.05},
            "sees": {
                "kind": "user_turn",
                "template": TEMPLATES[shape.trainer],
                "slots": {
                    "shown": {"kind": "column", "name": "demonstration"}
                    if shows_demonstration
                    else {"kind": "successful_sibling"}
                },
                "max_prompt_tokens": 2048,
            },
        },
        "losses": {
            "distil": {
                "kind": "distillation",
                "divergence": _divergence(shape),
                "support": SUPPORTS[shape.support],
                "average": {"kind": "per_sequence"},
            }
        },
        "optimizer": {"lr": 1e-5},
        "training": {"steps": shape.steps, "prompts_per_step": shape.prompts, "zero_stage": stage},
        "output": {"trackers": [], "tripwire_steps": None},
    }
    if shape.lora:
        spec["model"]["lora"] = {"r": 16, "lora_alpha": 32}
    if not shows_demonstration:
        spec["rewards"] = {"any": {"kind": "regex", "pattern": "^"}}
    path.write_text(yaml.safe_dump(spec, sort_keys=False))


def _divergence(shape: Shape) -> dict[str, Any]:
    if shape.support == "sampled_token":
        return {"kind": "reverse_kl"}
    return {"kind": "forward_kl"} if shape.trainer == "sdft" else {"kind": "jsd", "teacher_share": 0.5}


def read_steps(run: Path) -> list[dict[str, float]]:
    """Return each step's seconds, its seconds of sampling, scoring and updating, and its sampled tokens.

    Sampling includes the transfer of weights to the backend.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": m["time/step"],
            "sampling": m["time/rollout"] + m["time/sync"],
            "teacher": m["time/teacher"],
            "update": m["time/update"],
            "tokens": m["rollout/tokens"],
        }
        for m in lines
        if "time/step" in m
    ]
