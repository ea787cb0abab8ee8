"""Checks that train: pages in miniature, forms of training, the life of a run, and a model of 1.5B parameters."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

import sdkit
from tools.gpu_check import figures
from tools.gpu_check.setup import Check, Setup, Skipped

SOME_PAGES = ("sdft", "multi_teacher")
"""Method pages of a dry run."""
Spec = dict[str, Any]


def import_heavy() -> None:
    """Import what the checks need, so that their processes need not; a fork may not follow the start of CUDA."""
    from sdkit.distributed import zero

    zero.prepare()
    names = ("deepspeed", "peft", "transformers.models.llama.modeling_llama", "sdkit.cli", "sdkit.train.smoke")
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            importlib.import_module(name)


def pages(dtype: Literal["float32", "bfloat16"], setup: Setup) -> dict[str, Any]:
    """`sdkit smoke` of every method page: the gradient norm of the first step against the CPU's."""
    from sdkit.train.smoke import smoke

    if setup.miniature and dtype == "bfloat16":
        raise Skipped("left out of a dry run")
    folder = Path(sdkit.__file__).parent / "methods"
    names = SOME_PAGES if setup.miniature else sorted(path.stem for path in folder.glob("*.yaml"))
    norms: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name in names:
        spec = sdkit.load_spec(folder / f"{name}.yaml")
        try:
            lines = smoke(spec, Console(file=io.StringIO()), 1, folder, dtype)
        except Exception as error:  # the other pages still count
            errors[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        norms[name] = next(line["grad_norm"] for line in lines if "grad_norm" in line)
    compared = figures.compare(setup.name, norms, dtype)
    return compared | {"errors": errors, "ok": compared.get("ok", True) and not errors}


def base_spec(model: Path) -> Spec:
    """Return a run of two steps: forward KL to an average of the student that sees a demonstration."""
    rows = [{"prompt": f"What is {i} + {i}?", "demonstration": f"{i} + {i} = {2 * i}"} for i in range(8)]
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"source": {"kind": "inline", "rows": rows}, "columns": {n: n for n in rows[0]}},
        "rollout": {"completions_per_prompt": 2, "max_new_tokens": 16, "backend": "transformers"},
        "teacher": {
            "weights": {"kind": "ema", "update_rate": 0.1},
            "sees": {
                "template": "{prompt}\nExample: {shown}",
                "slots": {"shown": {"kind": "column", "name": "demonstration"}},
            },
        },
        "losses": {"distil": {"kind": "distillation", "divergence": "forward_kl", "support": "vocabulary"}},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 2, "prompts_per_step": 4, "zero_stage": 0},
        "output": {"trackers": [], "checkpoint_every": 1},
    }


def tiny_model(setup: Setup, name: str = "model", seed: int = 0) -> Path:
    from sdkit.models import tiny

    return tiny.build(setup.folder / name, seed=seed)


def command(*words: object) -> None:
    """Run a command of sdkit in this process; raises SystemExit with its code if it fails."""
    from sdkit import cli

    sys.argv = ["sdkit", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


def train(setup: Setup, spec: Spec, *options: str, run: str = "run") -> list[dict[str, float]]:
    """Train the spec with `sdkit train`; returns the metrics of its steps."""
    path = setup.folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    command("train", path, "--to", setup.folder / run, *options)
    return metrics(setup.folder / run)


def metrics(run: Path) -> list[dict[str, float]]:
    from sdkit.runs.directory import read_lines

    return [line for line in read_lines(run / "metrics.jsonl") if "grad_norm" in line]


LORA = {"r": 4, "lora_alpha": 8}
FORM_CHANGES: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    # dtype, ZeRO stage, changes by section
    "stage 0": ("float32", 0, {}),
    "stage 1, bfloat16": ("bfloat16", 1, {}),
    "stage 2, LoRA": ("float32", 2, {"model": {"lora": LORA}}),
    "stage 2, QLoRA": ("float32", 2, {"model": {"lora": {**LORA, "quantize_base": "nf4"}}}),
    "stage 3": ("float32", 3, {}),
    "stage 3, LoRA, bfloat16": ("bfloat16", 3, {"model": {"lora": LORA}}),
    "stage 1, optimizer offloaded": ("float32", 1, {"training": {"offload": ["optimizer"]}}),
    "stage 3, all offloaded": ("float32", 3, {"training": {"offload": ["optimizer", "parameters"]}}),
    "stage 2, frozen teacher": ("float32", 2, {"teacher": {"weights": "frozen"}}),
    "stage 3, external teacher": ("float32", 3, {"teacher": {"weights": {"kind": "external", "path": "OTHER"}}}),
    "activation checkpointing": ("float32", 1, {"model": {"activation_checkpointing": True}}),
}
SOME_FORMS = ("stage 0", "stage 3, external teacher")


def form(setup: Setup) -> dict[str, Any]:
    """Two steps of a form of training: the first gradient norm against the CPU's."""
    name = setup.name.removeprefix("form: ")
    dtype, stage, changes = FORM_CHANGES[name]
    if setup.miniature and name not in SOME_FORMS:
        raise Skipped("left out of a dry run")
    spec = base_spec(tiny_model(setup))
    spec["model"]["dtype"], spec["training"]["zero_stage"] = dtype, stage
    for section, values in changes.items():
        spec[section] |= values
    if "QLoRA" in name and importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    if "external" in name:
        other = str(tiny_model(setup, "other", seed=1))
        spec["teacher"]["weights"] = {"kind": "external", "path": other, "dtype": dtype}
    steps = train(setup, spec)
    return figures.compare(setup.name, {"first step": steps[0]["grad_norm"]}, dtype) | {"loss": steps[-1]["loss"]}


def life_of_a_run(setup: Setup) -> dict[str, Any]:
    """A run continued from a checkpoint equals one that was not, and so does its replay; export and conversion work."""
    spec = base_spec(tiny_model(setup))
    spec["training"]["zero_stage"] = 1
    whole = train(setup, spec, "training.steps=3", run="whole")
    train(setup, spec, run="parts")
    resumed = train(setup, spec, "training.steps=3", "--resume", run="parts")
    command("replay", f"{setup.folder / 'whole'}@0", "--to", setup.folder / "replayed")
    replayed = metrics(setup.folder / "replayed")
    command("export", setup.folder / "whole", "--to", setup.folder / "exported")
    command("checkpoint", "convert", setup.folder / "whole", "--processes", 2)
    losses = [[step["loss"] for step in steps] for steps in (whole, resumed, replayed)]
    largest = max(abs(a - b) / abs(a) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))
    return {"largest_difference": largest, "ok": largest < 1e-3}  # a GPU may add up in another order


def out_of_memory(setup: Setup) -> dict[str, Any]:
    """A run without memory ends with code 5."""
    setup.needs_gpu()
    torch.cuda.set_per_process_memory_fraction(16 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        train(setup, base_spec(tiny_model(setup)))
    except SystemExit as ended:
        return {"code": ended.code, "ok": ended.code == 5}
    return {"code": 0, "ok": False}


def large_model(checkpointing: bool, setup: Setup) -> dict[str, Any]:
    """Steps of a random model of 1.5B parameters in bfloat16, frozen teacher: tokens/s, MFU and peaks of the last one."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    if setup.miniature and not checkpointing:
        raise Skipped("left out of a dry run")
    model = tiny_model(setup)
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    if setup.miniature:
        sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
    ends = json.loads((model / "config.json").read_text())["eos_token_id"]
    config = Qwen2Config(
        **sizes,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=ends,
    )
    with setup.device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    if not setup.on_cpu:
        torch.cuda.empty_cache()
    spec = base_spec(model)
    spec["model"] |= {"dtype": "bfloat16", "activation_checkpointing": checkpointing}
    spec["teacher"]["weights"] = "frozen"
    for row in spec["data"]["source"]["rows"]:
        row["prompt"] += " What is the answer?" * (1 if setup.miniature else 100)
    spec["rollout"] |= {"max_new_tokens": 8 if setup.miniature else 256}
    spec["training"] |= {"steps": 1 if setup.miniature else 3, "prompts_per_step": 8, "zero_stage": 1}
    del spec["output"]["checkpoint_every"]
    last = train(setup, spec)[-1]
    return {name: value for name, value in last.items() if name.startswith(("time/", "memory/"))}


def _named(prefix: str, names: Sequence[str], check: Check) -> dict[str, Check]:
    return {f"{prefix}: {name}": check for name in names}


PAGES: dict[str, Check] = {"pages, float32": partial(pages, "float32"), "pages, bfloat16": partial(pages, "bfloat16")}
FORMS: dict[str, Check] = _named("form", tuple(FORM_CHANGES), form)
LIFE: dict[str, Check] = {"life of a run": life_of_a_run, "out of memory": out_of_memory}
LARGE: dict[str, Check] = {
    "1.5B": partial(large_model, False),
    "1.5B, activation checkpointing": partial(large_model, True),
}
