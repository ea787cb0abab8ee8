"""A run's picture: loss, score and completion length over steps, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[Mapping[str, Any]]


def plot(lines: Lines, target: Path, title: str) -> None:
    """Write plot.png.  `lines` are the objects of metrics.jsonl."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    _loss(axes[0], lines)
    _scores(axes[1], lines)
    _length(axes[2], lines)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [s for s, _ in found], [v for _, v in found]


def _loss(axis: Any, lines: Lines) -> None:
    axis.set_title("loss")
    axis.plot(*_series(lines, "loss"), label="training", color="tab:blue")
    steps, values = _series(lines, "eval/loss")
    if steps:
        axis.plot(steps, values, "o-", label="held out", color="tab:orange")
        axis.legend(frameon=False)


def _scores(axis: Any, lines: Lines) -> None:
    axis.set_title("held-out scores, 95 % intervals")
    names = sorted(
        {k for line in lines for k in line if k.startswith("eval/") and f"{k}_low" in line}
    )
    for name in names:
        if name == "eval/score":
            continue
        steps, values = _series(lines, name)
        _, low = _series(lines, f"{name}_low")
        _, high = _series(lines, f"{name}_high")
        label = name.removeprefix("eval/").partition("/")[2]
        (line,) = axis.plot(steps, values, "o-", label=label, markersize=3)
        axis.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
    axis.set_ylim(-0.02, 1.02)
    if any(n != "eval/score" for n in names):
        axis.legend(frameon=False, fontsize=7)


def _length(axis: Any, lines: Lines) -> None:
    axis.set_title("completion length, tokens")
    axis.plot(*_series(lines, "rollout/completion_tokens"), color="tab:green")
    axis.set_ylim(bottom=0)
