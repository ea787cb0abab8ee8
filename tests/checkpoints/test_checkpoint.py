"""Which checkpoint a run resumes from: the newest complete one of its own; and what a failed save leaves."""

import itertools
import json
import os
import random
import subprocess
import threading
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from rich.console import Console
from tinyruns import advance, assert_equal, hidden_states, make_spec, teacher, train, training, with_evaluation

from sdkit import processes
from sdkit.checkpoints import checkpoint, manifest, resume, rng
from sdkit.checkpoints.manifest import Origin
from sdkit.language import files
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import EmaWeights, OutputSpec

EMA = teacher(EmaWeights(update_rate=0.3))


def console():
    return Console(file=StringIO(), width=300)


@pytest.fixture(scope="module")
def four_step_run(tiny_folder, tmp_path_factory):
    """Spec and folder of a run of four steps that keeps every checkpoint."""
    output = OutputSpec(checkpoint_every=1, keep_checkpoints=5, trackers=())
    spec = make_spec(tiny_folder, teacher=EMA, training=training(steps=4), output=output)
    return spec, train(spec, tmp_path_factory.mktemp("three") / "run")


def test_files_of_a_checkpoint_are_hashed_at_the_same_time(four_step_run, monkeypatch):
    """The first two calls wait for each other."""
    both, calls, hash_file = threading.Barrier(2), itertools.count(), files.sha256_of

    def wait_for_the_other(path):
        if next(calls) < 2:
            both.wait(timeout=60)
        return hash_file(path)

    monkeypatch.setattr(files, "HASHING_THREADS", 2)
    monkeypatch.setattr(files, "sha256_of", wait_for_the_other)
    manifest.read(four_step_run[1] / "checkpoints" / "step_000003", hashes=True)


@pytest.fixture
def run(four_step_run, tmp_path):
    """A copy of that run for the test to damage."""
    target = tmp_path / "run"
    subprocess.run(["cp", "-r", four_step_run[1], target], check=True)
    return target


def own_origin(four_step_run, run, ranks=1):
    return Origin(
        run=json.loads((run / "provenance.json").read_text())["run"],
        spec=manifest.spec_digest(four_step_run[0]),
        ranks=ranks,
    )


def newest_checkpoint(four_step_run, run, ranks=1, hashes=True):
    messages = []
    newest = resume.newest_checkpoint(run, own_origin(four_step_run, run, ranks), messages.append, hashes=hashes)
    return newest.name, messages


def test_manifest_names_every_file_and_its_origin(four_step_run):
    spec, folder = four_step_run
    last = folder / "checkpoints" / "step_000003"
    contents = json.loads((last / "MANIFEST.json").read_text())
    assert set(contents["files"]) == {p.name for p in last.iterdir()} - {"MANIFEST.json"}
    assert {"random_rank_0.json", "teacher.safetensors"} <= set(contents["files"])
    assert contents["files"]["teacher.safetensors"]["bytes"] == ((last / "teacher.safetensors").stat().st_size)
    assert (contents["step"], contents["updates"], contents["skipped"], contents["zero_stage"]) == (3, 3, 0, 0)
    assert contents["origin"]["ranks"] == 1
    assert contents["origin"]["spec"] == manifest.spec_digest(spec)


def test_length_memory_and_output_do_not_change_the_spec_digest(four_step_run):
    spec, _ = four_step_run
    free = evolve(spec.training, steps=9, micro_batch_tokens=500, chunk_tokens=9)
    same_run = evolve(spec, training=free, output=OutputSpec(folder="elsewhere"))
    assert manifest.spec_digest(same_run) == manifest.spec_digest(spec)
    other = evolve(spec, training=evolve(spec.training, seed=1))
    assert manifest.spec_digest(other) != manifest.spec_digest(spec)


def test_random_streams_continue_after_restore():
    rng.seed_all(3, 0)
    state = json.loads(json.dumps(rng.state()))

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()

    first = draw()
    assert draw() != first
    rng.restore(state)
    assert draw() == first
    rng.seed_all(3, 1)
    assert draw() != first


def test_checkpoint_restores_the_teacher(open_tiny, tiny_folder, tmp_path):
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
        assert_equal(other.models.teacher.state()[name], value)
    assert_equal(
        hidden_states(other, other.models.teacher.weights), hidden_states(trainer, trainer.models.teacher.weights)
    )
    assert_equal(hidden_states(other, other.models.student), hidden_states(trainer, trainer.models.student))


@pytest.mark.parametrize(("keep", "steps"), [(1, [10]), (2, [2, 10])])
def test_only_the_newest_checkpoints_are_kept(open_tiny, tmp_path, keep, steps):
    trainer = open_tiny(output=OutputSpec(keep_checkpoints=keep, trackers=()))
    (tmp_path / "checkpoints" / "step_000099").mkdir(parents=True)
    for trainer.progress.step in (1, 2, 10):
        checkpoint.save(trainer.state, tmp_path, trainer.setup.spec)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{n:06d}" for n in steps]


def test_best_model_is_saved(tiny_folder, tmp_path, monkeypatch):
    """Losses 3, 1, 2 at steps 0, 1, 2: the model of step 1 stays."""
    from sdkit.train import loop

    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: {"eval/loss": next(losses)})
    saved = []
    save_model = checkpoint.save_model

    def save_and_record(student, tokenizer, run):
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        saved.append((run.name, status["step"]))
        return save_model(student, tokenizer, run)

    monkeypatch.setattr(checkpoint, "save_model", save_and_record)
    output = OutputSpec(keep_best="loss", trackers=())
    spec = make_spec(tiny_folder, training=training(steps=2), output=output)
    run = train(with_evaluation(spec, every=1, teacher_lift=0), tmp_path / "run")
    assert saved == [("best", 0), ("best", 1), ("run", 2)]
    assert json.loads((run / "best/best.json").read_text()) == {"step": 1, "eval/loss": 1.0}
    best, last = ((run / n / "model.safetensors").read_bytes() for n in ("best/model", "model"))
    assert best != last


def test_newest_complete_checkpoint_is_chosen(four_step_run, run):
    assert newest_checkpoint(four_step_run, run) == ("step_000003", [])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path):
    path.write_text(path.read_text().replace('"updates": 3', '"updates": 2'))


@pytest.mark.parametrize(
    ("name", "spoil", "expected"),
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
def test_damaged_checkpoint_is_named_and_skipped(four_step_run, run, name, spoil, expected):
    damaged = run / "checkpoints/step_000003" / name
    spoil(damaged)
    if name == "MANIFEST.json" and spoil is cut:
        cut(damaged)  # the first cut took the newline
    newest, (message,) = newest_checkpoint(four_step_run, run)
    assert newest == "step_000002"
    assert message.startswith("passed over: step_000003 ")
    assert expected in message


def test_only_the_first_rank_reads_every_byte(four_step_run, run):
    flip(run / "checkpoints/step_000003/teacher.safetensors")
    assert newest_checkpoint(four_step_run, run, hashes=False)[0] == "step_000003"


def test_checkpoint_of_another_run_or_spec_is_skipped(four_step_run, run):
    provenance = json.loads((run / "provenance.json").read_text())
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        contents = manifest.read(folder, hashes=False)
        changed = {"step_000002": {"run": "another"}, "step_000003": {"spec": "another"}}
        foreign = evolve(contents.origin, **changed[folder.name])
        manifest.write(folder, evolve(contents, origin=foreign))
    assert provenance["run"] != "another"
    assert newest_checkpoint(four_step_run, run) == (
        "step_000001",
        ["passed over: step_000003 was written under another spec", "passed over: step_000002 belongs to another run"],
    )


def test_error_names_every_checkpoint_if_none_is_usable(four_step_run, run):
    for folder in (run / "checkpoints").iterdir():
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(UnreadableInput, match="no checkpoint that can be resumed from") as caught:
        train(four_step_run[0], run, resume=True)
    assert caught.value.message.count("is not complete") == 3
    assert "--overwrite" in caught.value.hint


def test_another_number_of_ranks_is_refused_with_a_hint(four_step_run, run):
    with pytest.raises(UnreadableInput, match="fits 1 rank, but there are 2 now") as caught:
        newest_checkpoint(four_step_run, run, ranks=2)
    assert "continue with --processes 1" in caught.value.hint
    assert f"`sdkit checkpoint convert {run} --processes 2`" in caught.value.hint


def test_changed_rows_are_refused(four_step_run, run):
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["data"]["train"] = "0" * 64
    (run / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(UnreadableInput, match="not those that this run began with: train"):
        train(four_step_run[0], run, resume=True)


def report_previous_attempt(run, **status):
    (run / "status.json").write_text(json.dumps(status))
    messages = []
    resume.report_previous_attempt(run, messages.append)
    return messages


def test_attempt_that_exited_silently_is_reported(tmp_path):
    (message,) = report_previous_attempt(tmp_path, state="running", pid=2**22 + 1, process="boot/1", step=7)
    assert "exited without updating its status after step 7" in message
    assert "dmesg" in message
    assert report_previous_attempt(tmp_path, state="stopped", pid=1, step=7) == []


def test_run_in_training_cannot_be_resumed(tmp_path):
    start = processes.own_start()
    with pytest.raises(UnreadableInput, match=f"by process {os.getpid()}"):
        report_previous_attempt(tmp_path, state="running", pid=os.getpid(), process=start)
    # The same number after another start is another process.
    assert report_previous_attempt(tmp_path, state="running", pid=os.getpid(), process=start + 1)


def test_process_mark_of_older_versions_is_understood(tmp_path):
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    with pytest.raises(UnreadableInput, match=f"by process {os.getpid()}"):
        report_previous_attempt(tmp_path, state="running", pid=os.getpid(), process=f"f3b1c9d2/{ticks}")
    for mark in (f"f3b1c9d2/{ticks + 100}", "unreadable", None):
        assert report_previous_attempt(tmp_path, state="running", pid=os.getpid(), process=mark)


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


def test_full_disk_keeps_the_older_checkpoint(four_step_run, open_tiny, small_disk):
    trainer = open_tiny(four_step_run[0])
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
    names = sorted(p.name for p in (small_disk / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000002"]  # up to five are kept
