"""What `validate` accepts trains, stops, resumes and replays: run files on rows in files, rollout servers, ranks and vLLM."""

import json
import os
from functools import partial
from pathlib import Path

import drawn_runs
import generated_runs
import pytest
import yaml
from vllm_build import require_vllm

pytest.importorskip("uvicorn", reason="the rollout servers of these tests run on uvicorn")
from tinyservers import TinySampler

from sdkit.language.errors import Diverged
from sdkit.language.load import load_spec
from sdkit.serving.tiny_server import TinyServer

EXAMPLES = int(os.environ.get("SDKIT_EXAMPLES", "2000"))
FEW = range(4)
MANY = range(200, 200 + EXAMPLES)
ON_RANKS = (209,)
MANY_ON_RANKS = range(200, 200 + EXAMPLES // 10)
MANY_WITH_VLLM = range(200, 200 + EXAMPLES // 20)
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


def accepted(inputs, seeds, prefix="", **options):
    """Yields the path and the spec of each drawn run file that is accepted."""
    folder, draw = inputs
    for seed in seeds:
        path = folder / f"{prefix}{seed}.yaml"
        path.write_text(yaml.safe_dump(draw(seed, **options), sort_keys=False))
        checked = load_spec(path)
        if checked.ok:
            yield path, checked.spec


def faults_in_processes(warm, ranks, paths):
    """What goes wrong where the run files train on several ranks, by name."""
    script = Path(drawn_runs.__file__)
    done = warm.run(script, ranks, paths[0].parent, *(path.stem for path in paths))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", FEW)
def test_accepted_run_file_trains(inputs, seed):
    for path, spec in accepted(inputs, [seed]):
        drawn_runs.stop_resume_and_replay(path, spec)


def test_accepted_run_file_trains_on_two_ranks(warm, inputs):
    paths = [path for path, _ in accepted(inputs, ON_RANKS, "ranks ")]
    assert paths
    assert faults_in_processes(warm, 2, paths) == {}


@pytest.mark.full
@pytest.mark.timeout(0)
def test_accepted_run_files_train_many(inputs):
    faults = {}
    for path, spec in accepted(inputs, MANY):
        try:
            drawn_runs.stop_resume_and_replay(path, spec)
        except Diverged:
            continue  # as a run may
        except Exception as error:
            faults[path.name] = repr(error)
    assert not faults


@pytest.mark.full
@pytest.mark.timeout(0)
def test_accepted_run_files_train_on_two_ranks_many(warm, inputs):
    assert faults_in_processes(warm, 2, [path for path, _ in accepted(inputs, MANY_ON_RANKS, "ranks ")]) == {}


@pytest.mark.full
@pytest.mark.timeout(0)
def test_accepted_run_files_train_with_vllm_many(warm, inputs):
    require_vllm()
    paths = [path for path, _ in accepted(inputs, MANY_WITH_VLLM, "vllm ", backends=("vllm",))]
    assert faults_in_processes(warm, 1, paths) == {}
