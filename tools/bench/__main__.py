"""Measures sdkit and TRL side by side: `python -m tools.bench`.

Each round runs every side of every shape once, in alternation, each in a process of its own; a figure is the median over
rounds, a range its lowest and highest value.  A session folder keeps logs and measurements; with `--folder` a later
command measures only what the session lacks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import evolve

from sdkit.plan.machine import emulates_bfloat16
from tools.bench import measure, page
from tools.bench.measure import Measurement, Session
from tools.bench.shapes import FURTHER, MAIN, SCALING, Shape, Side

POINTS = tuple(point for points in SCALING.values() for point in points)
SETS = {"main": MAIN, "further": FURTHER, "scaling": POINTS}
BENCH = measure.ROOT / "runs/bench"


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    names = [*SETS, *(shape.name for shape in (*MAIN, *FURTHER))]
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = ", ".join(names)
    parser.add_argument("names", nargs="*", default=["main"], metavar="NAME", help=f"of {listed} (default: main)")
    parser.add_argument("--rounds", type=int, default=3, help="of main; other shapes have a third (default: 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of all shapes (default: each its own)")
    parser.add_argument("--folder", type=Path, help="the session (default: a new folder in runs/bench)")
    parser.add_argument("--page", type=Path, help="write tables and plots to this page")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no shape {', '.join(sorted(unknown))}: use {listed}")
    return options


def choose(names: Sequence[str], dtype: str | None) -> dict[str, Shape]:
    """Return the named shapes and sets by shape's name.  In a given `dtype` the shape `float32` is left out."""
    shapes = {shape.name: shape for group in SETS.values() for shape in group}
    chosen = [shape.name for name in names for shape in SETS.get(name, (shapes.get(name),)) if shape]
    if dtype is None:
        return {name: shapes[name] for name in chosen}
    return {name: evolve(shapes[name], dtype=dtype) for name in chosen if name != "float32"}


def schedule(shapes: Sequence[Shape], rounds: int) -> Iterator[tuple[int, Shape, Side]]:
    """Yield what to measure, in order; every second round has the sides in reverse."""
    main = {shape.name for shape in MAIN}
    for number in range(rounds):
        for shape in shapes:
            if shape.name in main or number < -(-rounds // 3):
                for side in shape.sides[:: -1 if number % 2 else 1]:
                    yield number, shape, side


def describe(measured: Measurement) -> str:
    """Return one line on a measurement."""
    name = f"round {measured.round + 1}  {measured.shape:22} {measured.side:12}"
    if measured.error:
        return f"{name} failed: {measured.error}"
    return f"{name} {measured.rate():7.1f} tokens/s, {measured.peak_gib:.1f} GiB"


def main() -> None:
    options = parse()
    shapes = choose(options.names, options.dtype)
    folder = (options.folder or BENCH / time.strftime("%Y%m%d-%H%M%S")).resolve()
    print(f"session: {folder}", flush=True)
    if emulates_bfloat16() and any(shape.dtype == "bfloat16" for shape in shapes.values()):
        print("this processor has no bfloat16 instructions and is many times slower in it: use --dtype float32")
    machines = [measure.measure_machine(folder, number) for number in range(options.rounds)]
    session = Session(folder=folder, cache=BENCH / "cache", shapes=shapes, machines=machines)
    done: list[Measurement] = []
    for number, shape, side in schedule(list(shapes.values()), options.rounds):
        done.append(measure.measure(session, shape, side, number))
        print(describe(done[-1]), flush=True)
    session = evolve(session, done=done)
    print(page.speed_table(session, list(shapes)))
    if options.page:
        page.write(options.page, session)


if __name__ == "__main__":
    main()
