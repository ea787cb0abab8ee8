"""Pictures: a run's loss, score and completion length over steps; several runs' scores over what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.runs.evaluations import Key
from sdkit.runs.history import AXES, Run
from sdkit.language.errors import UnreadableInput

Lines = Sequence[Mapping[str, Any]]
FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600")
"""Told apart with any kind of sight (Okabe and Ito, the yellow darkened)."""
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")


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


# ── several runs ──────────────────────────────────────────────────────────────────────────────


def picture_of(target: Path) -> None:
    """Make sure that a picture can be written there.  Raises UnreadableInput where it cannot."""
    if target.suffix.lower() not in FORMATS:
        raise UnreadableInput(f"{target} is no picture's name: it ends in none of {FORMATS}")
    if not target.resolve().parent.is_dir():
        raise UnreadableInput(f"{target.parent} is no folder")


def plot_runs(runs: Sequence[Run], keys: Sequence[Key], target: Path) -> None:
    """One panel each over tokens, steps and time: a colour per run, a line style per decoding, intervals as bands.

    `keys` differ in their decoding alone.  Raises OSError where the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), sharey=True, constrained_layout=True)
    colours = [*COLOURS] if len(runs) <= len(COLOURS) else _many(len(runs))
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        panel.set_title({"tokens": "over tokens", "steps": "over steps", "time": "over time"}[axis])
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        for place, run in enumerate(runs):
            for number, key in enumerate(keys):
                held = [p for p in run.points if key in p.scores]
                x = [point.at(axis) for point in held]
                each = [point.scores[key] for point in held]
                panel.plot(
                    x,
                    [interval.mean for interval in each],
                    STYLES[number % len(STYLES)],
                    color=colours[place],
                    marker=MARKERS[place % len(MARKERS)],
                    markersize=4,
                    label=run.name if len(keys) == 1 else f"{run.name}, {key[1]}",
                )
                low, high = [i.low for i in each], [i.high for i in each]
                panel.fill_between(x, low, high, color=colours[place], alpha=0.12, linewidth=0)
    panels[0].set_ylabel("score")
    panels[0].legend(frameon=False, fontsize=7)
    suite, _, reward = keys[0]
    figure.suptitle(f"{reward} on {suite} (held out), bands: 95 % intervals over prompts")
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _many(count: int) -> list[Any]:
    from matplotlib import pyplot as plt

    return list(plt.get_cmap("turbo")([i / (count - 1) for i in range(count)]))
