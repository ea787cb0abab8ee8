"""The lines that a run prints for a step, an evaluation and a sample.  Text only; what is printed where is in report.py."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen
from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from sdkit.runs import retention
from sdkit.runs.evaluations import EvaluationResult, main_keys

LOG_LINE = 80 - len("00:00:00 ")
"""Characters of a line in a log, whose lines begin with the time: it fits 80 columns."""
DEVICE_MEMORY, HOST_MEMORY = "memory/device_reserved_gib", "memory/peak_gib"


@frozen
class _Part:
    """A part of a step's line."""

    text: str
    rank: int  # parts of the highest rank are left out first
    style: str = ""


def step_line(step: int, end: int, metrics: Mapping[str, float], room: int, *, sampled: bool = True) -> Text:
    """Returns the main figures of a step on one line of at most `room` characters, or more in a very narrow terminal.

    What does not fit is left out in this order: the completion length, rewards from the last to the second, memory,
    throughput, the first reward.  Step, loss, gradient norm and time always stay.  `sampled` is False if no model wrote
    the completions.
    """
    if "loss" in metrics:
        trained = _Part(f"loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.2f}", 0)
    else:
        trained = _Part("no rollout kept, no update", 0, "yellow")
    rewards = [(name.removeprefix("reward/"), v) for name, v in metrics.items() if name.startswith("reward/")]
    parts = [trained, _Part(f"length {metrics['rollout/completion_tokens']:.1f}", 4 + len(rewards))]
    parts += [_Part(f"{name} {value:.2f}", 3 + i if i else 1) for i, (name, value) in enumerate(rewards)]
    if "time/trained_tokens_per_second" in metrics or sampled:
        parts.append(_Part(_throughput(metrics, sampled=sampled), 2, "dim"))
    memory = metrics.get(DEVICE_MEMORY, metrics.get(HOST_MEMORY))
    if memory is not None:
        parts.append(_Part(f"{memory:.1f} GiB", 3, "dim"))
    parts.append(_Part(f"{metrics['time/step']:.1f} s", 0, "dim"))
    if metrics["skipped_steps"]:
        parts.append(_Part("skipped", 0, "red"))
    return _join(step, end, parts, room)


def _join(step: int, end: int, parts: list[_Part], room: int) -> Text:
    """The parts that fit, in order; an ellipsis stands where rewards were left out."""
    line = Text.assemble("step ", (str(step), "bold"), f"/{end}")
    used = line.cell_len + sum(2 + cell_len(part.text) for part in parts)
    for part in sorted(parts, key=lambda part: -part.rank):
        if used <= room or not part.rank:
            break
        used -= 2 + cell_len(part.text)
        parts.remove(part)
    for part in parts:
        line.append("  ").append(part.text, part.style)
    return line


def _throughput(metrics: Mapping[str, float], *, sampled: bool) -> str:
    """Tokens a second: sampled / trained on; a dash for what did not happen in the step."""
    rate = metrics.get("time/tokens_per_second") if sampled else None
    return f"{_rate(rate)}/{_rate(metrics.get('time/trained_tokens_per_second'))} tok/s"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value < 9999.5 else f"{value / 1000:.0f}k"


def evaluation_lines(step: int, result: EvaluationResult, seconds: float) -> list[str]:
    """Returns a line of scores for each suite of the task, with its name if there are several, and one for the panel."""
    suites = [suite for suite in result.sizes if suite not in result.panel]
    lines: list[str] = []
    for suite in suites:
        name = f"evaluation after step {step}" + (f", {escape(suite)}" if len(suites) > 1 else "")
        scores = [
            f"{'/'.join(key[1:])} {result.interval(key).mean:.3f}"
            for key in main_keys(result.scores)
            if key[0] == suite
        ]
        lines.append(f"[cyan]{name}[/]: {escape(', '.join(scores))}")
    if figures := retention.means(result):
        scores = ", ".join(f"{name} {mean:.3f}" for name, mean in figures.items())
        lines.append(f"[cyan]evaluation after step {step}, panel[/]: {escape(scores)}")
    lines[-1] += f" [dim]({seconds:.0f} s)[/]"
    return lines


def one_line(text: str) -> str:
    """Returns a text on one line of at most 160 characters."""
    flat = " ⏎ ".join(text.splitlines())
    return flat if len(flat) <= 160 else flat[:157] + "…"
