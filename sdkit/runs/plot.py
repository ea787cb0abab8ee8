"""Plots: a run's loss, scores and completion length over steps; several runs' scores over tokens, steps and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.language.errors import UnreadableInput
from sdkit.runs.evaluations import Key
from sdkit.runs.history import AXES, Axis, Run

Lines = Sequence[Mapping[str, Any]]
FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600")
"""Distinguishable with any colour vision (Okabe and Ito, the yellow darkened)."""
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")


def plot(lines: Lines, target: Path, title: str) -> None:
    """Write a run's plot to `target`.  `lines` are the objects of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    _loss(axes[0], lines)
    _scores(axes[1], lines)
    _length(axes[2], lines)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(target, dpi=130)


def _series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """The steps that have this metric, and its values."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def _loss(axis: Any, lines: Lines) -> None:
    axis.set_title("loss")
    axis.plot(*_series(lines, "loss"), label="training", color="tab:blue")
    steps, values = _series(lines, "eval/loss")
    if steps:
        axis.plot(steps, values, "o-", label="held out", color="tab:orange")
        axis.legend(frameon=False)


def _scores(axis: Any, lines: Lines) -> None:
    axis.set_title("held-out scores, 95 % intervals")
    names = sorted({k for line in lines for k in line if k.startswith("eval/") and f"{k}_low" in line})
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


def check_plot_path(target: Path) -> None:
    """Raise UnreadableInput if no picture can be written to `target`."""
    if target.suffix.lower() not in FORMATS:
        raise UnreadableInput(f"{target} is not the name of a picture: it must end in one of {', '.join(FORMATS)}")
    if not target.resolve().parent.is_dir():
        raise UnreadableInput(f"{target.parent} is not a folder")


def plot_runs(runs: Sequence[Run], keys: Sequence[Key], target: Path) -> None:
    """Plot scores over tokens, steps and time: a colour per run, a line style per decoding, intervals as bands.

    `keys` may differ in their decoding only.  Raises OSError if the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    spread = [i / (len(runs) - 1) for i in range(len(runs))] if len(runs) > len(COLOURS) else []
    colours = list(colormaps["turbo"](spread)) if spread else COLOURS
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        panel.set_title(f"over {axis}")
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        for i, run in enumerate(runs):
            for j, key in enumerate(keys):
                style = {
                    "color": colours[i],
                    "marker": MARKERS[i % len(MARKERS)],
                    "linestyle": STYLES[j % len(STYLES)],
                    "label": run.name if len(keys) == 1 else f"{run.name}, {key[1]}",
                }
                _plot_scores(panel, run, key, axis, style)
    panels[0].set_ylabel("score")
    panels[0].legend(frameon=False, fontsize=7)
    suite, _, reward = keys[0]
    figure.suptitle(f"{reward} on {suite} (held out), bands: 95 % intervals over prompts")
    figure.savefig(target, dpi=130)


def _plot_scores(panel: Any, run: Run, key: Key, axis: Axis, style: Mapping[str, Any]) -> None:
    points = [point for point in run.points if key in point.scores]
    x = [point.at(axis) for point in points]
    intervals = [point.scores[key] for point in points]
    panel.plot(x, [interval.mean for interval in intervals], markersize=4, **style)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
