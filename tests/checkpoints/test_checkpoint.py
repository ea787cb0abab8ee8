"""Which checkpoint is taken up: whole, this run's own, and the newest of these; and what is left where none can be written."""

import json
import os
import random
import subprocess
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from rich.console import Console
from tinyruns import advance, evaluated, make_spec, same, states, teacher, train, training

from sdkit import processes
from sdkit.checkpoints import checkpoint, manifest, resume, rng
from sdkit.checkpoints.manifest import Origin
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import EmaWeights, OutputSpec

EMA = teacher(EmaWeights(update_rate=0.3))


def console():
    return Console(file=StringIO(), width=300)


@pytest.fixture(scope="module")
def three(tiny_folder, tmp_path_factory):
    """A run of four steps with every checkpoint kept."""
    output = OutputSpec(checkpoint_every=1, keep_checkpoints=5, tensorboard=False)
    spec = make_spec(tiny_folder, teacher=EMA, training=training(steps=4), output=output)
    return spec, train(spec, tmp_path_factory.mktemp("three") / "run")


@pytest.fixture
def run(three, tmp_path):
    """A copy of it, to be spoilt."""
    target = tmp_path / "run"
    subprocess.run(["cp", "-r", three[1], target], check=True)
    return target


def own(three, run, ranks=1):
    return Origin(
        run=json.loads((run / "provenance.json").read_text())["run"], spec=manifest.spec_digest(three[0]), ranks=ranks
    )


def chosen(three, run, ranks=1, hashes=True):
    said = []
    found = resume.newest_checkpoint(run, own(three, run, ranks), said.append, hashes=hashes)
    return found.name, said


def test_the_manifest_names_every_file_and_its_origin(three):
    spec, folder = three
    last = folder / "checkpoints" / "step_000003"
    held = json.loads((last / "MANIFEST.json").read_text())
    assert set(held["files"]) == {p.name for p in last.iterdir()} - {"MANIFEST.json"}
    assert {"random_rank_0.json", "teacher.safetensors"} <= set(held["files"])
    assert held["files"]["teacher.safetensors"]["bytes"] == ((last / "teacher.safetensors").stat().st_size)
    assert (held["step"], held["updates"], held["skipped"], held["zero_stage"]) == (3, 3, 0, 0)
    assert held["origin"]["ranks"] == 1
    assert held["origin"]["spec"] == manifest.spec_digest(spec)


def test_length_memory_and_output_do_not_make_another_spec(three):
    spec, _ = three
    free = evolve(spec.training, steps=9, micro_batch_tokens=500, chunk_tokens=9)
    same_run = evolve(spec, training=free, output=OutputSpec(folder="elsewhere"))
    assert manifest.spec_digest(same_run) == manifest.spec_digest(spec)
    other = evolve(spec, training=evolve(spec.training, seed=1))
    assert manifest.spec_digest(other) != manifest.spec_digest(spec)


def test_random_streams_go_on_where_they_stood():
    rng.seed_all(3, 0)
    held = json.loads(json.dumps(rng.state()))

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()

    first = draw()
    assert draw() != first
    rng.restore(held)
    assert draw() == first
    rng.seed_all(3, 1)
    assert draw() != first


def test_a_checkpoint_holds_the_teacher(open_tiny, tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, teacher=EMA, training=training(zero_stage=1))
    trainer = open_tiny(spec)
    advance(trainer, 2)
    saved = checkpoint.save(trainer.state, tmp_path, trainer.setup.spec)
    advance(trainer, 1)
    other = open_tiny(spec)
    checkpoint.load(other.state, saved, other.setup.spec.training.seed)
    assert other.progress.optimizer_steps == 2
    advance(other, 1)
    for name, value in trainer.models.teacher.state().items():
        same(other.models.teacher.state()[name], value)
    same(states(other, other.models.teacher.weights), states(trainer, trainer.models.teacher.weights))
    same(states(other, other.models.student), states(trainer, trainer.models.student))


@pytest.mark.parametrize(("keep", "left"), [(1, [10]), (2, [2, 10])])
def test_the_newest_are_kept(open_tiny, tmp_path, keep, left):
    trainer = open_tiny(output=OutputSpec(keep_checkpoints=keep, tensorboard=False))
    (tmp_path / "checkpoints" / "step_000099").mkdir(parents=True)
    for trainer.progress.step in (1, 2, 10):
        checkpoint.save(trainer.state, tmp_path, trainer.setup.spec)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step_{n:06d}" for n in left]


def test_the_best_model_is_kept(tiny_folder, tmp_path, monkeypatch):
    """Losses 3, 1, 2 at steps 0, 1, 2: the model of step 1 stays."""
    from sdkit.train import loop

    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: {"eval/loss": next(losses)})
    kept = []
    written = checkpoint.save_model

    def noted(student, tokenizer, run):
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        kept.append((run.name, status["step"]))
        return written(student, tokenizer, run)

    monkeypatch.setattr(checkpoint, "save_model", noted)
    output = OutputSpec(keep_best="loss", tensorboard=False)
    spec = make_spec(tiny_folder, training=training(steps=2), output=output)
    run = train(evaluated(spec, every=1, teacher_lift=0), tmp_path / "run")
    assert kept == [("best", 0), ("best", 1), ("run", 2)]
    assert json.loads((run / "best/best.json").read_text()) == {"step": 1, "eval/loss": 1.0}
    best, last = ((run / n / "model.safetensors").read_bytes() for n in ("best/model", "model"))
    assert best != last


def test_the_newest_whole_one_is_taken_up(three, run):
    assert chosen(three, run) == ("step_000003", [])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def edit(path):
    path.write_text(path.read_text().replace('"updates": 3', '"updates": 2'))


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("teacher.safetensors", cut, "is damaged: teacher.safetensors has"),
        ("teacher.safetensors", flip, "is damaged: teacher.safetensors is not what was written"),
        ("mp_rank_00_model_states.pt", flip, "mp_rank_00_model_states.pt is not what was written"),
        ("random_rank_0.json", os.unlink, "is damaged: random_rank_0.json is missing"),
        ("more.pt", lambda path: path.touch(), "has a file that does not belong to it: more.pt"),
        ("MANIFEST.json", os.unlink, "is not complete: it has no MANIFEST.json"),
        ("MANIFEST.json", cut, "has a MANIFEST.json that cannot be read"),
        ("MANIFEST.json", edit, "has a MANIFEST.json that was changed"),
    ],
)
def test_a_spoilt_one_is_named_and_passed_over(three, run, name, spoil, told):
    at = run / "checkpoints/step_000003" / name
    spoil(at)
    if name == "MANIFEST.json" and spoil is cut:
        cut(at)  # the first cut took the newline
    found, (said,) = chosen(three, run)
    assert found == "step_000002"
    assert said.startswith("passed over: step_000003 ")
    assert told in said


def test_only_the_first_rank_reads_every_byte(three, run):
    flip(run / "checkpoints/step_000003/teacher.safetensors")
    assert chosen(three, run, hashes=False)[0] == "step_000003"


def test_a_foreign_one_is_passed_over(three, run):
    marks = json.loads((run / "provenance.json").read_text())
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        found = manifest.read(folder, hashes=False)
        changed = {"step_000002": {"run": "another"}, "step_000003": {"spec": "another"}}
        mine = evolve(found.origin, **changed[folder.name])
        manifest.write(folder, evolve(found, origin=mine))
    assert marks["run"] != "another"
    assert chosen(three, run) == (
        "step_000001",
        ["passed over: step_000003 was written under another spec", "passed over: step_000002 belongs to another run"],
    )


def test_where_none_is_left_all_are_named(three, run):
    for folder in (run / "checkpoints").iterdir():
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(UnreadableInput, match="no checkpoint that can be resumed from") as caught:
        train(three[0], run, resume=True)
    assert caught.value.message.count("is not complete") == 3
    assert "--overwrite" in caught.value.hint


def test_another_number_of_ranks_is_refused_with_what_to_do(three, run):
    with pytest.raises(UnreadableInput, match="fits 1 rank, but there are 2 now") as caught:
        chosen(three, run, ranks=2)
    assert "continue with --processes 1" in caught.value.hint
    assert f"`sdkit checkpoint convert {run} --processes 2`" in caught.value.hint


def test_other_rows_are_refused(three, run):
    held = json.loads((run / "provenance.json").read_text())
    held["data"]["train"] = "0" * 64
    (run / "provenance.json").write_text(json.dumps(held))
    with pytest.raises(UnreadableInput, match="not those that this run began with: train"):
        train(three[0], run, resume=True)


def left(run, **status):
    (run / "status.json").write_text(json.dumps(status))
    said = []
    resume.report_previous_attempt(run, said.append)
    return said


def test_a_silent_end_is_named(tmp_path):
    (said,) = left(tmp_path, state="running", pid=2**22 + 1, process="boot/1", step=7)
    assert "exited without updating its status after step 7" in said
    assert "dmesg" in said
    assert left(tmp_path, state="stopped", pid=1, step=7) == []


def test_a_run_that_is_being_trained_is_left_alone(tmp_path):
    start = processes.own_start()
    with pytest.raises(UnreadableInput, match=f"by process {os.getpid()}"):
        left(tmp_path, state="running", pid=os.getpid(), process=start)
    # The same number after another start is another process.
    assert left(tmp_path, state="running", pid=os.getpid(), process=start + 1)


def test_the_mark_of_an_older_sdkit_is_understood(tmp_path):
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    with pytest.raises(UnreadableInput, match=f"by process {os.getpid()}"):
        left(tmp_path, state="running", pid=os.getpid(), process=f"f3b1c9d2/{ticks}")
    for mark in (f"f3b1c9d2/{ticks + 100}", "unreadable", None):
        assert left(tmp_path, state="running", pid=os.getpid(), process=mark)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_the_older_checkpoint(three, open_tiny, small_disk):
    trainer = open_tiny(three[0])
    trainer.progress.step = 1
    first = checkpoint.save(trainer.state, small_disk, trainer.setup.spec)
    size = sum(p.stat().st_size for p in first.iterdir())
    free = os.statvfs(small_disk)
    room = free.f_bavail * free.f_frsize
    (small_disk / "ballast").write_bytes(bytes(room - size // 2))
    trainer.progress.step = 2
    with pytest.raises(BadEnvironment, match=r"cannot write .*step_000002: ") as caught:
        checkpoint.save(trainer.state, small_disk, trainer.setup.spec)
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.hint
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step_000001"]
    manifest.read(first, hashes=True)
    (small_disk / "ballast").unlink()
    assert checkpoint.save(trainer.state, small_disk, trainer.setup.spec).name == "step_000002"
    left = sorted(p.name for p in (small_disk / "checkpoints").iterdir())
    assert left == ["step_000001", "step_000002"]  # of five that may stay
