"""Runs TRL's trainer on a shape: `python trl_side.py SHAPE.json MODEL ROWS OUT` in the environment with TRL.

The weights are in the shape's precision, without float32 masters and without autocast.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer  # pyright: ignore[reportMissingImports]

MODES = {"vocabulary": "full_logits", "top_k": "topk_logits", "sampled_token": "sampled_token"}


class StepClock(TrainerCallback):
    """Records each step's seconds, its seconds of sampling and its sampled tokens."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = _now()
        self.steps[-1]["seconds"] = now - self.last
        self.last = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(trainer: type, clock: StepClock) -> type:
    """Return the trainer's class with its sampling recorded by the clock."""

    class Timed(trainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            started = _now()
            prompts, completions = super()._generate(*args, **kwargs)
            clock.steps.append({"tokens": sum(map(len, completions)), "sampling": _now() - started})
            return prompts, completions

    return Timed


def common_settings(shape: dict[str, Any], out: str) -> dict[str, Any]:
    """Return the fields that both configurations share."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": shape["prompts"] * shape["group"],
        "num_generations": shape["group"],
        "gradient_accumulation_steps": 1,
        "max_prompt_length": 2048,
        "max_completion_length": shape["max_new_tokens"],
        "max_steps": shape["steps"],
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "distillation_mode": MODES[shape["support"]],
        "distillation_topk": 100 if shape["support"] == "top_k" else None,
        "distillation_add_tail": True,
        "distillation_is_clip": None,
        "teacher_model_kind": "ema",
        "model_init_kwargs": {"dtype": getattr(torch, shape["dtype"])},
        "gradient_checkpointing": False,
        "bf16": False,  # autocast; the weights' own precision is used instead
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def make_trainer(shape: dict[str, Any], templates: dict[str, str], out: str, clock: StepClock, **parts: Any) -> Any:
    """Return the shape's trainer."""
    settings = common_settings(shape, out)
    if shape["trainer"] == "sdft":
        alpha = 1.0 if shape["support"] == "sampled_token" else 0.0  # 0: KL(teacher‖student), 1: KL(student‖teacher)
        template = templates["sdft"].replace("{shown}", "{privileged_context}")
        settings |= {"distillation_alpha": alpha, "teacher_update_rate": 0.01, "teacher_prompt_template": template}
        return timed(SDFTTrainer, clock)(args=SDFTConfig(**settings), **parts)
    template = templates["sdpo"].replace("{shown}", "{solution}")
    settings |= {"distillation_alpha": 0.5, "teacher_update_rate": 0.05, "reprompt_template": template}
    settings["solution_template"] = "{successful_previous_attempt}"
    rewards = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
    return timed(SDPOTrainer, clock)(args=SDPOConfig(**settings), **parts, **rewards)


def main(shape_file: str, model: str, rows: str, out: str) -> None:
    given = json.loads(Path(shape_file).read_text())
    shape = given["shape"]
    clock = StepClock()
    trainer = make_trainer(
        shape,
        given["templates"],
        out,
        clock,
        model=model,
        train_dataset=load_dataset("json", data_files=rows, split="train", cache_dir=f"{out}/cache"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if shape["lora"] else None,
    )
    trainer.add_callback(clock)  # last, so that a step includes the teacher's update
    trainer.train()
    (Path(out) / "steps.json").write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
