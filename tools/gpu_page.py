"""What fits which machine, by `sdkit plan`: the table of docs/gpu.md, and comments of the papers' run files.

`python tools/gpu_page.py` writes them; `--check` only compares.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from sdkit.language.load import load_spec
from sdkit.language.model_shapes import shape_from_config
from sdkit.plan.accelerators import ACCELERATORS, AcceleratorName, Machine
from sdkit.plan.machine import shape_of
from sdkit.plan.memory import BYTES, GIB
from sdkit.plan.plan import make_plan
from sdkit.plan.text import NEARLY_FULL

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
PAPERS = sorted((ROOT / "specs" / "papers").glob("*.yaml"))
OWN = re.compile(r"(# Memory of a rank: )\d+ GiB(?= on 8 × H200;)")
SMALLER = re.compile(r"(; )\d+ GiB(?= on 8 × H100 of 80 GB with training\.zero_stage=3\.)")
BEGIN, END = "<!-- written by tools/gpu_page.py -->", "<!-- until here -->"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def _qwen3(hidden: int, layers: int, inner: int, heads: int, *, tied: bool) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }
    return QWEN3 | sizes | {"tie_word_embeddings": tied}


MODELS: Mapping[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 28, 3072, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 6144, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 9728, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 12288, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 40, 17408, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 64, 25600, 64, tied=False),
}
"""The models' config.json."""

MACHINES: Mapping[str, tuple[AcceleratorName, float, int]] = {
    "1 × H100 80 GB": ("h100", 79, 1),
    "8 × H100 80 GB": ("h100", 79, 8),
    "8 × H200": ("h200", 139, 8),
    "2 nodes, 16 × H100": ("h100", 79, 16),
}
"""Accelerator, GiB that each has, and ranks."""

CHECKPOINTING = "model.activation_checkpointing=true"
LADDER: Sequence[Sequence[str]] = (
    ("training.zero_stage=1",),
    ("training.zero_stage=2",),
    ("training.zero_stage=2", CHECKPOINTING),
    ("training.zero_stage=3", CHECKPOINTING),
    ("training.zero_stage=3", CHECKPOINTING, "training.offload=[optimizer]"),
    ("training.zero_stage=3", CHECKPOINTING, "training.offload=[optimizer, parameters]"),
)
"""Settings in the order in which they slow training down; the first that fits is shown."""
CACHE_GIB = 8
"""Smallest cache of vLLM, beside its weights."""
LORA = "model.lora={r: 64, lora_alpha: 128}"
QLORA = "model.lora={r: 64, lora_alpha: 128, quantize_base: nf4}"
SHORT = {
    "training.zero_stage=1": "stage 1",
    "training.zero_stage=2": "stage 2",
    "training.zero_stage=3": "stage 3",
    CHECKPOINTING: "checkpointing",
    "training.offload=[optimizer]": "optimizer offloaded",
    "training.offload=[optimizer, parameters]": "all offloaded",
}


def run_file() -> str:
    """Returns the run file that the page shows first."""
    block = re.search(r'```yaml title="run.yaml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block, "docs/gpu.md shows no run.yaml"
    return block[1]


def ladder(path: Path, extra: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns the specs of the ladder, each with its settings in words; without stage 3, which QLoRA does not have."""
    steps = [settings for settings in LADDER if QLORA not in extra or "training.zero_stage=3" not in settings]
    specs = [load_spec(path, [*extra, *settings]).spec for settings in steps]
    assert all(specs), "the run file of docs/gpu.md has problems"
    return [(", ".join(SHORT[s] for s in settings), spec) for settings, spec in zip(steps, specs, strict=True)]


def cell(specs: Sequence[tuple[str, Any]], config: Mapping[str, Any], machine: Machine) -> str:
    """Returns the first settings of the ladder that fit, vLLM's share, and the memory of a rank; or `–`."""
    assert machine.memory_gib is not None
    shape = shape_from_config(config)
    for settings, spec in specs:
        weights = shape.parameters * BYTES[spec.model.dtype] / GIB
        share = math.ceil(10 * (weights + CACHE_GIB) / machine.memory_gib) / 10
        if share >= 1:
            break
        backend = evolve(spec.rollout.backend, gpu_memory_utilization=share)
        spec = evolve(spec, rollout=evolve(spec.rollout, backend=backend))
        peak = make_plan(spec, machine, shape).peak_gib
        assert peak is not None
        if peak <= NEARLY_FULL * machine.memory_gib:
            return f"{settings}; {share:g}: {peak:.0f} GiB"
    return "–"


def table() -> str:
    """Returns one row for each model and way to train it, one column for each machine."""
    lines = ["| model | trained | " + " | ".join(MACHINES) + " |", "|---" * (2 + len(MACHINES)) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(run_file(), encoding="utf-8")
        ways = {"all weights": (), "LoRA": (LORA,), "QLoRA": (QLORA,)}
        ladders = {way: ladder(path, extra) for way, extra in ways.items()}
    for model, config in MODELS.items():
        for way, specs in ladders.items():
            cells = [cell(specs, config, machine(name)) for name in MACHINES]
            lines.append(f"| {model} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(name: str) -> Machine:
    """Returns the machine of a column."""
    accelerator, memory, ranks = MACHINES[name]
    return Machine(ranks=ranks, memory_gib=memory, vllm="0.32.0", accelerator=ACCELERATORS[accelerator])


def paper_text(path: Path) -> str:
    """Returns a paper's run file with the memory of a rank in its comments as the plan says it is now."""
    spec: Any = load_spec(path).spec
    sharded = evolve(spec, training=evolve(spec.training, zero_stage=3))
    text = path.read_text(encoding="utf-8")
    for pattern, one, name in ((OWN, spec, "8 × H200"), (SMALLER, sharded, "8 × H100 80 GB")):
        where = machine(name)
        peak = make_plan(one, where, shape_of(one, path.parent)).peak_gib
        if peak is None or where.memory_gib is None or peak > NEARLY_FULL * where.memory_gib:
            raise SystemExit(f"{path.name} does not fit {name}")
        text = pattern.sub(rf"\g<1>{peak:.0f} GiB", text)
    return text


def main() -> int:
    """Write the table and the papers' comments, or check them; the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    texts = {PAGE: f"{before}{BEGIN}\n{table()}\n{END}{after}"} | {path: paper_text(path) for path in PAPERS}
    changed = {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}
    if "--check" in sys.argv[1:]:
        for path in changed:
            print(f"the memory in {path.relative_to(ROOT)} has changed: run tools/gpu_page.py and read the diff")
        return 1 if changed else 0
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
