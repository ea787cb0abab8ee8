"""How sdkit's step grows with its parts, and what the plan's time model says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from attrs import evolve, frozen

from sdkit.language.load import load_spec
from sdkit.language.model_shapes import shape_at
from sdkit.language.specs import ExperimentSpec, ShapeSpec
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

**Measured** are sampling, teacher and update; the rest of a step is not predicted. **Predicted** is the time model of
`sdkit plan` (`sdkit/plan/time.py`) with this machine's measured rates. Its two constants, the share of the matrix rate
that a pass over full sequences reaches and the share of the bandwidth that decoding reaches, are {default} by default,
for data-center GPUs; fitted to these points they are {fitted}.
"""


@frozen(kw_only=True)
class Point:
    """A measured step, and what the plan needs to predict it."""

    shape: Shape
    measured: Measurement
    spec: ExperimentSpec
    model: ShapeSpec

    @property
    def value(self) -> int:
        """The point's place on its axis."""
        return int(self.shape.name.rpartition(" ")[2])

    @property
    def seconds(self) -> list[float]:
        return [self.measured.seconds(phase) for phase in PHASES]

    def predict(self, device: Accelerator) -> list[float]:
        """Return the seconds of sampling, teacher and update that the plan predicts."""
        ranks = self.shape.ranks  # they share the machine
        share = evolve(device, teraflops=device.teraflops / ranks, terabytes=device.terabytes / ranks)
        time = make_plan(self.spec, Machine(ranks=ranks, accelerator=share), self.model).step_time
        assert time is not None
        assert time.unknown_reason is None, time.unknown_reason
        return [phase.seconds for phase in time.phases]


def read_point(session: Session, measured: Measurement) -> Point:
    """Return a measurement with its spec; the spec's longest prompts are those of the rows."""
    shape = session.shapes[measured.shape]
    folder = inputs.model_folder(shape, session.cache)
    model = shape_at(str(folder), Path())
    assert model is not None
    spec: Any = load_spec(folder_of(session.folder, shape, measured.side, measured.round) / "spec.yaml").spec
    prompt, teacher_prompt = map(round, inputs.prompt_lengths(shape, folder))
    sees = evolve(spec.teacher.sees, max_prompt_tokens=teacher_prompt)
    rollout = evolve(spec.rollout, max_prompt_tokens=prompt)
    spec = evolve(spec, rollout=rollout, teacher=evolve(spec.teacher, sees=sees))
    return Point(shape=shape, measured=measured, spec=spec, model=model)


def section(session: Session, plot: Path) -> str:
    """Return the section of the page; writes the plot."""
    measurements = [measured for measured in session.done if measured.shape in NAMES]
    points = [read_point(session, measured) for measured in measurements if not measured.error]
    default = accelerator(session)
    fitted = fit(default, points)
    draw(fitted, points, plot)
    rows = ["| | measured, s | predicted, s | predicted with the fitted constants, s |", "|---|---|---|---|"]
    for point in points:
        phases = (point.seconds, point.predict(default), point.predict(fitted))
        rows.append(f"| {' | '.join([point.shape.name, *(' + '.join(f'{s:.2f}' for s in p) for p in phases)])} |")
    rows += [f"| {measured.shape} | failed: {measured.error} | | |" for measured in measurements if measured.error]
    return TEXT.format(table="\n".join(rows), default=_constants(default), fitted=_constants(fitted))


def _constants(device: Accelerator) -> str:
    return f"{device.compute_utilization:.0%} and {device.bandwidth_utilization:.0%}"


def accelerator(session: Session) -> Accelerator:
    """Return this machine as an accelerator of the plan, with its measured rates."""
    dtype = next(shape for name, shape in session.shapes.items() if name in NAMES).dtype
    return Accelerator(
        title="machine",
        dtype=dtype,
        teraflops=median(float(machine[dtype]) for machine in session.machines) / 1e12,
        terabytes=median(float(machine["bytes"]) for machine in session.machines) / 1e12,
    )


def fit(device: Accelerator, points: Sequence[Point]) -> Accelerator:
    """Return the device with the utilizations that bring the predictions nearest to the measurements.

    That of compute is fitted to teacher and update, that of bandwidth then to sampling.
    """
    if not points:
        return device
    ratios = [sum(point.predict(device)[1:]) / sum(point.seconds[1:]) for point in points]
    device = evolve(device, compute_utilization=device.compute_utilization * median(ratios))

    def error(share: float) -> float:
        tried = evolve(device, bandwidth_utilization=share)
        return median(abs(math.log(point.predict(tried)[0] / point.seconds[0])) for point in points)

    return evolve(device, bandwidth_utilization=min(UTILIZATIONS, key=error))


def draw(device: Accelerator, points: Sequence[Point], target: Path) -> None:
    """Write a plot with one panel for each axis: measured phases, and the predicted step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (axis, shapes) in zip(figure.subplots(1, len(SCALING)), SCALING.items(), strict=True):
        names = {shape.name for shape in shapes}
        on_axis = [point for point in points if point.shape.name in names]
        places = [point.value for point in on_axis]
        for i, phase in enumerate(PHASES):
            axes.plot(places, [point.seconds[i] for point in on_axis], "o-", label=phase)
        axes.plot(places, [point.measured.seconds() for point in on_axis], "ks-", label="step")
        axes.plot(places, [sum(point.predict(device)) for point in on_axis], "k:", label="predicted, fitted")
        axes.set_xlabel(axis)
        axes.set_xticks(places)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)
