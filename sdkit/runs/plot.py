"""Plots: a run's loss, completion length and scores over steps; several runs' scores over tokens, steps and time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.language.errors import UnreadableInput
from sdkit.runs import retention
from sdkit.runs.evaluations import Key, is_pass_at
from sdkit.runs.history import AXES, Axis, Run
from sdkit.runs.score_tables import Change

Lines = Sequence[Mapping[str, Any]]
FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600")
"""Distinguishable with any colour vision (Okabe and Ito, the yellow darkened)."""
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")
PANELS = 3
"""Panels of a run's plot side by side."""


def plot(lines: Lines, target: Path, title: str, panel: Collection[str] = ()) -> None:
    """Write a run's plot to `target`.  `lines` are the objects of metrics.jsonl, `panel` the suites of its panel."""
    figure_of_run(lines, title, panel).savefig(target, dpi=130)


def figure_of_run(lines: Lines, title: str, panel: Collection[str] = ()) -> Any:
    """A run's loss and completion length, the scores of each of the task's suites, and its retention, over steps."""
    from matplotlib.figure import Figure

    suites = {suite: keys for suite, keys in _score_names(lines).items() if suite not in panel}
    panels = 2 + len(suites) + bool(panel)
    rows, columns = -(-panels // PANELS), min(panels, PANELS)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    _loss(axes[0], lines)
    for axis, (suite, names) in zip(axes[1:], suites.items(), strict=False):
        _scores(axis, lines, suite, names)
    if panel:
        _retention(axes[panels - 2], lines)
    _length(axes[panels - 1], lines)
    for axis in axes[:panels]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.suptitle(title)
    return figure


def _series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """The steps that have this metric, and its values."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def _loss(axis: Any, lines: Lines) -> None:
    axis.set_title("loss")
    axis.plot(*_series(lines, "loss"), label="training", color=COLOURS[0])
    steps, values = _series(lines, "eval/loss")
    if steps:
        axis.plot(steps, values, "o-", label="held out", color=COLOURS[1])
        axis.legend(frameon=False)


def _score_names(lines: Lines) -> dict[str, list[Key]]:
    """The keys of the scores by suite, in the order of the metrics, without pass@k."""
    names = dict.fromkeys(name for line in lines for name in line if name.count("/") >= 3 and f"{name}_low" in line)
    suites: dict[str, list[Key]] = {}
    for name in names:
        suite, decoding, reward = name.removeprefix("eval/").split("/", 2)
        if not is_pass_at((suite, decoding, reward)):
            suites.setdefault(suite, []).append((suite, decoding, reward))
    return suites


def _scores(axis: Any, lines: Lines, suite: str, keys: Sequence[Key]) -> None:
    """One suite's scores: a colour for each reward, a line style and marker for each decoding."""
    axis.set_title(f"{suite} (held out), 95 % intervals")
    rewards, decodings = ([*dict.fromkeys(key[part] for key in keys)] for part in (2, 1))
    for key in keys:
        name = "eval/" + "/".join(key)
        steps, means = _series(lines, name)
        bounds = [_series(lines, f"{name}_{end}")[1] for end in ("low", "high")]
        look = _look(decodings.index(key[1])) | {"color": COLOURS[rewards.index(key[2]) % len(COLOURS)]}
        axis.plot(steps, means, markersize=4, label=f"{key[2]}, {key[1]}", **look)
        axis.fill_between(steps, *bounds, alpha=0.12, color=look["color"], linewidth=0)
        if all(0 <= value <= 1 for value in [*means, *bounds[0], *bounds[1]]):
            axis.set_ylim(-0.02, 1.02)
    axis.legend(frameon=False, fontsize=7)


def _retention(axis: Any, lines: Lines) -> None:
    axis.set_title("new skill and retention, 95 % intervals")
    for colour, (figure, name) in zip(COLOURS, retention.METRICS.items(), strict=False):
        steps, means = _series(lines, name)
        axis.plot(steps, means, "o-", markersize=4, label=figure, color=colour)
        bounds = [_series(lines, f"{name}_{end}")[1] for end in ("low", "high")]
        axis.fill_between(steps, *bounds, alpha=0.12, color=colour, linewidth=0)
    axis.legend(frameon=False, fontsize=7)


def _look(decoding: int) -> dict[str, Any]:
    """Line style and marker of a decoding, by its number."""
    return {"linestyle": STYLES[decoding % len(STYLES)], "marker": MARKERS[decoding % len(MARKERS)]}


def _length(axis: Any, lines: Lines) -> None:
    axis.set_title("completion length, tokens")
    axis.plot(*_series(lines, "rollout/completion_tokens"), color=COLOURS[2])
    axis.set_ylim(bottom=0)


def check_plot_path(target: Path) -> None:
    """Raise UnreadableInput if no picture can be written to `target`."""
    if target.suffix.lower() not in FORMATS:
        raise UnreadableInput(f"{target} is not the name of a picture: it must end in one of {', '.join(FORMATS)}")
    if not target.resolve().parent.is_dir():
        raise UnreadableInput(f"{target.parent} is not a folder")


Retentions = Mapping[str, Mapping[str, Change]]
"""For each run with a panel, by name, the figures of `retention.of_run`."""


def plot_runs(runs: Sequence[Run], keys: Sequence[Key], target: Path, retentions: Retentions | None = None) -> None:
    """Plot these scores over tokens, steps and time.  Raises OSError if the file cannot be written."""
    figure_of_runs(runs, keys, retentions).savefig(target, dpi=130)


def figure_of_runs(runs: Sequence[Run], keys: Sequence[Key], retentions: Retentions | None = None) -> Any:
    """A row of panels for each suite and reward: a colour for each run, a line style and marker for each decoding.

    The runs of several seeds are a thick line, their mean, and a thin one for each seed.  With `retentions`, a last row shows
    the change of each run's new skill against that of its retention.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [*dict.fromkeys((suite, reward) for suite, _, reward in keys)]
    decodings = [*dict.fromkeys(key[1] for key in keys)]
    height = len(rows) + bool(retentions)
    figure = Figure(figsize=(14, 0.4 + 3.8 * height), layout="constrained")
    panels = figure.subplots(height, len(AXES), sharey="row", squeeze=False)
    spread = [i / (len(runs) - 1) for i in range(len(runs))] if len(runs) > len(COLOURS) else []
    colours = list(colormaps["turbo"](spread)) if spread else COLOURS
    for (suite, reward), row in zip(rows, panels, strict=False):
        of_row = [key for key in keys if (key[0], key[2]) == (suite, reward)]
        for panel, (axis, label) in zip(row, AXES.items(), strict=True):
            panel.set_title(f"over {axis}")
            panel.set_xlabel(label)
            panel.grid(alpha=0.25)
            for colour, run in zip(colours, runs, strict=False):
                for key in of_row:
                    name = run.name if len(of_row) == 1 else f"{run.name}, {key[1]}"
                    look = _look(decodings.index(key[1])) | {"color": colour, "label": name}
                    _plot_scores(panel, run, key, axis, look)
        row[0].set_ylabel(f"{reward} on {suite}")
        row[0].legend(frameon=False, fontsize=7)
    if retentions:
        colour_of = dict(zip([run.name for run in runs], colours, strict=False))
        _skill_against_retention(panels[-1][0], retentions, colour_of)
        for axis in panels[-1][1:]:
            axis.set_axis_off()
    several = any(len(run.members) > 1 for run in runs)
    seeds = " and seeds; thin lines: single seeds" if several else ""
    figure.suptitle(f"held-out scores, bands: 95 % intervals over prompts{seeds}")
    return figure


def _skill_against_retention(axis: Any, retentions: Retentions, colours: Mapping[str, Any]) -> None:
    """A cross for each run: the changes of both figures, with their intervals."""
    axis.set_title("new skill against retention, 95 % intervals")
    axis.set_xlabel("change of retention")
    axis.set_ylabel("change of new skill")
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.axvline(0, color="0.7", linewidth=0.8)
    for name, figures in retentions.items():
        x, y = figures[retention.RETENTION]["change"], figures[retention.NEW_SKILL]["change"]
        bars = [[[_finite(i.mean - i.low)], [_finite(i.high - i.mean)]] for i in (x, y)]
        axis.errorbar([x.mean], [y.mean], xerr=bars[0], yerr=bars[1], fmt="o", color=colours[name], label=name)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7)


def _finite(width: float) -> float:
    """The width of an error bar; 0 for an interval without an end, which cannot be drawn."""
    return width if math.isfinite(width) else 0.0


def _plot_scores(panel: Any, run: Run, key: Key, axis: Axis, look: Mapping[str, Any]) -> None:
    points = [point for point in run.points if key in point.scores]
    if not points:
        return
    x = [point.at(axis) for point in points]
    intervals = [point.scores[key] for point in points]
    panel.plot(x, [interval.mean for interval in intervals], markersize=4, **look)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    panel.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    for member in run.members if len(run.members) > 1 else ():
        _plot_thin(panel, member, key, axis, look)


def _plot_thin(panel: Any, run: Run, key: Key, axis: Axis, look: Mapping[str, Any]) -> None:
    """One seed's scores, behind the mean."""
    points = [point for point in run.points if key in point.scores]
    x, means = [point.at(axis) for point in points], [point.scores[key].mean for point in points]
    panel.plot(x, means, color=look["color"], linestyle=look["linestyle"], linewidth=0.7, alpha=0.6, zorder=1)
