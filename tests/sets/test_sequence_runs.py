"""Sequences of runs on the tiny model: stages, what they start from, the accuracy matrix, and resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from os_processes import wait_until
from safetensors.torch import load_file

from sdkit.language.sequences import load_sequence
from sdkit.runs.directory import read_lines, read_status
from sdkit.runs.run_sets import read_set, write_set
from sdkit.runs.sequences import holds_sequence, read_sequence, summary
from sdkit.sets.sequences import seeds_of_sequence, sequence_set

RUN = """
model: {path: MODEL, dtype: float32}
data:
  source: {kind: inline, rows: [{q: 1 + 1, d: "1 + 1 = 2"}, {q: 2 + 2, d: "2 + 2 = 4"}, {q: 3 + 3, d: "3 + 3 = 6"}]}
  columns: {prompt: q, demonstration: d}
rollout: {max_new_tokens: 8, backend: transformers}
teacher:
  weights: {kind: ema, update_rate: 0.5}
  sees: {template: "{prompt} ({demonstration})", slots: {demonstration: {kind: column, name: demonstration}}}
losses:
  distil: {kind: distillation, divergence: forward_kl, support: vocabulary}
rewards:
  digit: {kind: regex, pattern: '\\d'}
evaluation:
  suites:
    one: {data: {source: {kind: inline, rows: [{q: 7 + 7, d: "14"}, {q: 8 + 7, d: "15"}]}}, score: digit, decoding: &drawn {drawn: {temperature: 1.0}}, loss_prompts: 0}
  teacher_lift: 0
optimizer: {lr: 1.0e-2}
training: {steps: 2, prompts_per_step: 2, zero_stage: 0}
output: {trackers: []}
"""
SEQUENCE = """
run: run.yaml
carry_over: CARRIED
stages:
  first: {}
  second:
    overrides:
      evaluation:
        suites:
          two: {data: {source: {kind: inline, rows: [{q: 2 + 2, d: "4"}, {q: 9 + 7, d: "16"}]}}, score: digit, decoding: {drawn: {temperature: 1.0}}, loss_prompts: 0}
"""


def write_files(folder, model, carried="[]"):
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(RUN.replace("MODEL", str(model)))
    (folder / "tasks.yaml").write_text(SEQUENCE.replace("CARRIED", carried))
    return folder / "tasks.yaml"


def begin(path, folder):
    run_set = sequence_set(load_sequence(path), (), folder)
    write_set(run_set)
    return run_set


def train_stage(warm, path, folder, stage, *options):
    done = warm.run("-m", "sdkit", "train", path, "--stage", stage, "--to", folder / stage, *options, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(warm, tiny_folder, tmp_path_factory):
    """A sequence whose optimizer and teacher go on, both stages trained."""
    home = tmp_path_factory.mktemp("sequence")
    path = write_files(home, tiny_folder, "[optimizer, teacher]")
    begin(path, home / "runs")
    for stage in ("first", "second"):
        train_stage(warm, path, home / "runs", stage)
    return path, home / "runs"


def test_a_stage_starts_from_the_weights_of_the_one_before(trained):
    _, runs = trained
    resolved = (runs / "second" / "resolved.yaml").read_text()
    assert f'path: "{(runs / "first" / "model").resolve()}"' in resolved
    before, after = (read_lines(runs / stage / "metrics.jsonl") for stage in ("first", "second"))
    end, start = before[-1], after[0]
    scores = [name for name in end if name.startswith("eval/") and name.endswith("/digit")]
    assert sorted(scores) == ["eval/one/drawn/digit", "eval/two/drawn/digit"]
    assert [end[name] for name in scores] == [start[name] for name in scores]
    # Its own training rows are those that no suite of any stage holds out: `2 + 2` is in the suite of the second.
    data = [
        json.loads((runs / stage / "provenance.json").read_text())["data"]["train"] for stage in ("first", "second")
    ]
    assert data[0] == data[1]


def test_optimizer_and_teacher_go_on_where_the_file_says_so(trained):
    _, runs = trained
    steps, teachers = [], []
    for stage in ("first", "second"):
        folder = runs / stage / "checkpoints" / "step_000002"
        saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
        steps.append(next(iter(saved["optimizer"]["state"].values()))["step"].item())
        teachers.append(load_file(folder / "teacher.safetensors"))
    assert steps == [2, 4]
    distance = read_lines(runs / "second" / "metrics.jsonl")
    assert distance[1]["step"] == 1
    model = load_file(runs / "first" / "model" / "model.safetensors")
    name = "model.norm.weight"
    assert not torch.equal(teachers[0][name], model[name])  # an average behind the student, which a new one is not


def test_a_finished_sequence_writes_the_matrix_and_is_compared(trained, sdkit):
    path, runs = trained
    code, out, err = sdkit("train", path, "--to", runs, "--resume")
    assert (code, err) == (0, "")
    assert "2 of 2 runs are finished already" in out
    stored = json.loads((runs / "sequence.json").read_text())
    assert stored == json.loads(json.dumps(summary(read_sequence(runs))))
    assert [row["after"] for row in stored["matrix"]] == [None, "first", "second"]
    assert stored["suites"]["two"] == {"stage": "second", "key": "two/drawn/digit", "prompts": 2}
    last = read_lines(runs / "second" / "metrics.jsonl")[-1]
    cell = stored["matrix"][2]["scores"]["one"]
    assert [cell[end] for end in ("mean", "low", "high")] == [
        last[f"eval/one/drawn/digit{end}"] for end in ("", "_low", "_high")
    ]
    assert stored["metrics"].keys() == {
        "accuracy", "learned", "backward_transfer", "forward_transfer", "forgetting"
    }  # fmt: skip
    assert holds_sequence(runs)
    assert not holds_sequence(runs / "first")
    code, out, _ = sdkit("compare", runs)
    assert code == 0
    assert "backward transfer" in out
    code, _, err = sdkit("compare", runs, runs / "first")
    assert code == 2
    assert "hold none" in err


def test_seeds_of_a_sequence_are_one_thing(trained, sdkit):
    path, runs = trained
    sdkit("train", path, "--to", runs, "--resume")
    folder = runs.with_name("seeds")
    write_set(seeds_of_sequence(load_sequence(path), (), (0, 1), folder))
    for seed in (0, 1):
        shutil.copytree(runs, folder / f"seed_{seed}")
    code, out, err = sdkit("train", path, "--to", folder, "--resume", "--seeds", "0,1")
    assert (code, err) == (0, "")
    assert "2 of 2 runs are finished already" in out
    both, one = (json.loads((f / "sequence.json").read_text()) for f in (folder, runs))
    assert len(both["seeds"]) == 2
    assert both["metrics"]["accuracy"]["mean"] == one["metrics"]["accuracy"]["mean"]
    code, _, err = sdkit("train", path, "training.seed=3", "--to", folder, "--resume", "--seeds", "0,1")
    assert code == 2
    assert "training.seed is given here and by --seeds" in err
    code, out, _ = sdkit("compare", runs, folder)
    assert code == 0
    assert "have no suite with the same prompts and as many seeds" in out


def test_validate_plan_and_other_commands(trained, sdkit):
    path, _ = trained
    code, out, _ = sdkit("validate", path)
    assert code == 0
    assert "tasks.yaml: ok (sequence file)" in out
    assert "stage 2, second: from the weights of first; measured by 'two'" in out
    code, out, _ = sdkit("plan", path)
    assert code == 0
    assert "4 rollout batches in 2 stages" in out
    for command in ("show", "smoke", "eval"):
        code, _, err = sdkit(command, path)
        assert code == 2
        assert "is a sequence file" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "third"], "stage 'third' is not one of 'first', 'second'"),
        (["--stage", "second"], "has no model/ yet"),
        (["--resume"], "is not a set of runs"),
    ],
)
def test_a_stage_that_cannot_start_is_refused(tiny_folder, tmp_path, sdkit, options, message):
    path = write_files(tmp_path, tiny_folder)
    target = tmp_path / "runs" / "x" if "--stage" in options else tmp_path / "runs"
    code, _, err = sdkit("train", path, *options, "--to", target)
    assert code == 2
    assert message in err


@pytest.mark.full
def test_a_killed_sequence_resumes_to_the_same_weights(tiny_folder, tmp_path):
    path = write_files(tmp_path, tiny_folder, "[optimizer, teacher]")
    command = [sys.executable, "-m", "sdkit", "train", path, "output.checkpoint_every=1", "training.steps=4", "--to"]
    subprocess.run([*command, tmp_path / "whole"], check=True)
    killed = tmp_path / "killed"
    for at in ((killed / "first", 2), (killed / "second", 1), (killed / "second", 3)):
        again = ["--resume"] if killed.exists() else []
        process = subprocess.Popen([*command, killed, *again], start_new_session=True)
        folder, step = at
        wait_until(lambda f=folder, s=step: read_status(f).get("step", 0) >= s or (f / "checkpoints").is_dir(), 120)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, killed, "--resume"], check=True)
    whole, resumed = (load_file(f / "second" / "model" / "model.safetensors") for f in (tmp_path / "whole", killed))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [run_set.states() for run_set in map(read_set, (tmp_path / "whole", killed))] == [
        {"first": "done", "second": "done"}
    ] * 2
    first, second = (json.loads((f / "sequence.json").read_text()) for f in (tmp_path / "whole", killed))
    assert first == second
