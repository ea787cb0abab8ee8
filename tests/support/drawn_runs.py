"""Trains drawn run files: each is interrupted after its first step, resumed, and replayed from its records.

`python drawn_runs.py RANKS FOLDER NAMES…` does so for the run files of these names on several ranks, replays each run on one, and prints
the faults as a JSON object from names to messages.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import forked
from tinyruns import lines, train

from sdkit.language.errors import Diverged, Stopped
from sdkit.language.load import load_spec

DEADLINE = 120.0  # seconds of one run on several ranks
FIGURES = ("step", "loss", "grad_norm", "reward/mean")


def trained(run):
    """Loss, gradient norm and reward of each step."""
    return [[line.get(name) for name in FIGURES] for line in lines(run / "metrics.jsonl") if "time/step" in line]


def run_folder(path):
    return path.with_name(f"{path.stem} run")


def stop(path, spec):
    """Trains until the first step has ended, when SIGINT arrives, as by Ctrl-C."""
    from sdkit.train.report import Report

    original = Report.step

    def stop_after_step(*args, **options):
        original(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(Report, "step", stop_after_step):
        try:
            train(spec, run_folder(path))
        except Stopped:
            return
    raise AssertionError("the run did not stop")


def resume(path, spec):
    train(spec, run_folder(path), resume=True)


def replay(path, spec):
    """Trains in this process on the recorded rollouts of a whole run; returns the folder of the new run."""
    from sdkit.train.replay import open_recording

    run = run_folder(path)
    assert [line[0] for line in trained(run)] == list(range(1, spec.training.steps + 1))
    return train(spec, run.with_name(f"{run.name} again"), recording=open_recording(f"{run}@0"))


def stop_resume_and_replay(path, spec):
    """The replay, which nothing interrupts, is the same."""
    stop(path, spec)
    resume(path, spec)
    assert trained(replay(path, spec)) == trained(run_folder(path))


def differences(one, other, tolerance):
    """The figures of `trained` that differ by more than a share of the larger one, as text."""
    pairs = ((a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    far = [(a, b) for a, b in pairs if a != b and abs(a - b) > tolerance * max(abs(a), abs(b), 1e-3)]
    return "; ".join(f"{a} and {b}" for a, b in far)


def faults_on_ranks(path, count, tolerance=1e-3):
    """What goes wrong where the run trains on `count` ranks and is replayed on one; empty if nothing does."""
    spec = load_spec(path).spec
    for part in (stop, resume):
        results = forked.ranks(count, lambda part=part: part(path, spec), run_folder(path), deadline=DEADLINE)
        if any(each.code for each in results):
            return "\n".join(each.output[-1500:] for each in results)

    def compare():
        figures = [trained(folder) for folder in (replay(path, spec), run_folder(path))]
        text = differences(*figures, tolerance)
        assert not text, text

    (result,) = forked.ranks(1, compare, path.with_name(f"{path.stem} compared"), deadline=DEADLINE)
    return result.output[-1500:] if result.code else ""


def main(count, folder, *names):
    forked.warm()
    found = {name: faults_on_ranks(Path(folder, f"{name}.yaml"), int(count)) for name in names}
    print(json.dumps({name: text for name, text in found.items() if text and Diverged.__name__ not in text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
