"""How sdkit's step grows with its parts, and what the plan's time model says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from attrs import evolve

from sdkit.language.load import load_spec
from sdkit.language.model_shapes import shape_at
from sdkit.plan.accelerators import Accelerator, Machine
from sdkit.plan.plan import make_plan
from tools.bench import inputs
from tools.bench.measure import Measurement, Session, folder_of
from tools.bench.shapes import SCALING, Shape

NAMES = {point.name for points in SCALING.values() for point in points}
PHASES = ("sampling", "teacher", "update")
UTILIZATIONS = [share / 200 for share in range(1, 201)]

TEXT = """\
## Scaling

Seconds of one sdkit step that samples with vLLM, where one thing grows and everything else stays equal: completions of 4
prompts; the group size at 16 completions of 32 tokens; the vocabulary of a model of width 256; ranks that share the
machine.

![seconds of a step over completion tokens, group size, vocabulary and ranks](assets/scaling.png)

{table}

**Predicted** is the time model of `sdkit plan` ([`sdkit/plan/time.py`](../sdkit/plan/time.py)) with this machine's
measured rates: sampling, teacher and update in seconds. Its two constants, the share of the matrix rate that a pass over
full sequences reaches and the share of the bandwidth that decoding reaches, are {default} by default, for data-center
GPUs; fitted to these points they are {fitted}.
"""


def section(session: Session, plot: Path) -> str:
    """Return the section of the page; writes the plot."""
    points = [measured for measured in session.done if measured.shape in NAMES]
    good = [measured for measured in points if not measured.error]
    default = accelerator(session)
    fitted = fit(session, default, good)
    rows = ["| | measured, s | predicted, s | predicted with the fitted constants, s |", "|---|---|---|---|"]
    for measured in points:
        cells = [f"failed: {measured.error}", "", ""]
        if not measured.error:
            seconds = [measured.seconds(phase) for phase in PHASES]
            predictions = (predict(session, device, measured) for device in (default, fitted))
            cells = [" + ".join(f"{s:.2f}" for s in phases) for phases in (seconds, *predictions)]
        rows.append(f"| {' | '.join([measured.shape, *cells])} |")
    draw(session, fitted, good, plot)
    return TEXT.format(table="\n".join(rows), default=_constants(default), fitted=_constants(fitted))


def _constants(device: Accelerator) -> str:
    return f"{device.compute_utilization:.0%} and {device.bandwidth_utilization:.0%}"


def accelerator(session: Session) -> Accelerator:
    """Return this machine as an accelerator of the plan, with its measured rates."""
    dtype = next(session.shapes[name].dtype for name in session.shapes if name in NAMES)
    return Accelerator(
        title="machine",
        dtype=dtype,
        teraflops=median(float(machine[dtype]) for machine in session.machines) / 1e12,
        terabytes=median(float(machine["bytes"]) for machine in session.machines) / 1e12,
    )


def predict(session: Session, device: Accelerator, measured: Measurement) -> list[float]:
    """Return the seconds of sampling, teacher and update that the plan predicts for a measurement."""
    shape = session.shapes[measured.shape]
    folder = inputs.model_folder(shape, session.cache)
    model = shape_at(str(folder), Path())
    spec: Any = load_spec(folder_of(session.folder, shape, measured.side, measured.round) / "spec.yaml").spec
    prompt, teacher_prompt = map(round, inputs.prompt_lengths(shape, folder))
    sees = evolve(spec.teacher.sees, max_prompt_tokens=teacher_prompt)
    rollout = evolve(spec.rollout, max_prompt_tokens=prompt)
    spec = evolve(spec, rollout=rollout, teacher=evolve(spec.teacher, sees=sees))
    ranks = shape.ranks  # they share the machine
    share = evolve(device, teraflops=device.teraflops / ranks, terabytes=device.terabytes / ranks)
    time = make_plan(spec, Machine(ranks=ranks, accelerator=share), model).step_time
    assert time is not None
    assert time.unknown_reason is None, time.unknown_reason
    return [phase.seconds for phase in time.phases]


def fit(session: Session, device: Accelerator, points: Sequence[Measurement]) -> Accelerator:
    """Return the device with the utilizations that bring the predictions nearest to the measurements.

    That of compute is fitted to teacher and update, that of bandwidth then to sampling.
    """
    if not points:
        return device
    ratios = []
    for measured in points:
        _, teacher, update = predict(session, device, measured)
        ratios.append((teacher + update) / (measured.seconds("teacher") + measured.seconds("update")))
    device = evolve(device, compute_utilization=device.compute_utilization * median(ratios))

    def error(share: float) -> float:
        tried = evolve(device, bandwidth_utilization=share)
        pairs = [(predict(session, tried, m)[0], m.seconds("sampling")) for m in points]
        return median(abs(math.log(predicted / seconds)) for predicted, seconds in pairs)

    return evolve(device, bandwidth_utilization=min(UTILIZATIONS, key=error))


def draw(session: Session, device: Accelerator, points: Sequence[Measurement], target: Path) -> None:
    """Write a plot with one panel for each axis: measured phases, and the predicted step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (axis, shapes) in zip(figure.subplots(1, len(SCALING)), SCALING.items(), strict=True):
        found = [measured for shape in shapes for measured in points if measured.shape == shape.name]
        places = [_value(session.shapes[measured.shape]) for measured in found]
        for phase in PHASES:
            axes.plot(places, [measured.seconds(phase) for measured in found], "o-", label=phase)
        axes.plot(places, [measured.seconds() for measured in found], "ks-", label="step")
        predicted = [sum(predict(session, device, measured)) for measured in found]
        axes.plot(places, predicted, "k:", label="predicted, fitted")
        axes.set_xlabel(axis)
        axes.set_xticks(places)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)


def _value(shape: Shape) -> int:
    return int(shape.name.rpartition(" ")[2])
