"""What `validate` accepts trains, stops, resumes and replays: run files on rows in files and on rollout servers."""

import os
import signal
from functools import partial

import generated_runs
import pytest
import yaml
from tinyruns import lines, train

pytest.importorskip("uvicorn", reason="the rollout servers of these tests run on uvicorn")
from tinyservers import TinySampler

from sdkit.language.errors import Diverged, Stopped
from sdkit.language.load import load_spec
from sdkit.serving.tiny_server import TinyServer
from sdkit.train.replay import open_recording
from sdkit.train.report import Report

FEW = range(4)
MANY = range(200, 200 + int(os.environ.get("SDKIT_EXAMPLES", "2000")))
"""Seeds of drawn run files; about a quarter is accepted."""


@pytest.fixture(scope="module")
def inputs(tiny_folder, other_folder, tmp_path_factory):
    """A folder with rows in every format, and a function that draws a run file for it."""
    folder = tmp_path_factory.mktemp("drawn runs")
    generated_runs.write_inputs(folder)
    sampler, teacher = TinySampler(tiny_folder, folder / "weights"), TinyServer(other_folder, "teacher")
    yield (
        folder,
        partial(
            generated_runs.run_file,
            model=tiny_folder,
            other=other_folder,
            teacher_url=teacher.url,
            sampler_url=sampler.url,
        ),
    )
    sampler.close()
    teacher.close()


def accepted(inputs, seeds):
    """Yields the path and the spec of each drawn run file that is accepted."""
    folder, draw = inputs
    for seed in seeds:
        path = folder / f"{seed}.yaml"
        path.write_text(yaml.safe_dump(draw(seed), sort_keys=False))
        checked = load_spec(path)
        if checked.ok:
            yield path, checked.spec


def trained(run):
    """Loss, gradient norm and reward of each step."""
    names = ("step", "loss", "grad_norm", "reward/mean")
    return [[line.get(name) for name in names] for line in lines(run / "metrics.jsonl") if "time/step" in line]


def stop_resume_and_replay(path, spec, monkeypatch):
    """Interrupts the run after its first step and resumes it; a replay, which is not interrupted, is the same."""
    run = path.with_name(f"{path.stem} run")
    with monkeypatch.context() as patch:
        original = Report.step

        def stop_after_step(*args, **options):
            original(*args, **options)
            os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Report, "step", stop_after_step)
        with pytest.raises(Stopped):
            train(spec, run)
    train(spec, run, resume=True)
    replayed = train(spec, run.with_name(f"{run.name} again"), recording=open_recording(f"{run}@0"))
    assert [line[0] for line in trained(run)] == list(range(1, spec.training.steps + 1))
    assert trained(replayed) == trained(run)


@pytest.mark.parametrize("seed", FEW)
def test_accepted_run_file_trains(inputs, seed, monkeypatch):
    for path, spec in accepted(inputs, [seed]):
        stop_resume_and_replay(path, spec, monkeypatch)


@pytest.mark.full
@pytest.mark.timeout(0)
def test_accepted_run_files_train_many(inputs, monkeypatch):
    faults = {}
    for path, spec in accepted(inputs, MANY):
        try:
            stop_resume_and_replay(path, spec, monkeypatch)
        except Diverged:
            continue  # as a run may
        except Exception as error:
            faults[path.name] = repr(error)
    assert not faults
