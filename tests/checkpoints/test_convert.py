"""A run that continues with another number of ranks equals one that never changed; refusals come with a hint.

convert_scenario.py makes the conversions and runs.  A run converted there and back is bitwise the same: every master, both
moments, their steps and the teacher's averages are carried over.  Another number of ranks adds in another order, so there
metrics agree to 1e-5 and weights to 1e-6 (test_ranks.py says why its optimizer allows that).
"""

import itertools
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from convert_scenario import FORMS, STEPS, TEACHERS
from safetensors import safe_open
from safetensors.torch import save_file
from tinyruns import (
    assert_equal,
    make_spec,
    metrics,
    run_scenario,
    silent_console,
    teacher,
    train,
    training,
    weights_of,
)

from sdkit import processes
from sdkit.checkpoints import convert, manifest, resume, rng
from sdkit.cli import main
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import EmaWeights, OutputSpec

SCENARIO = Path(__file__).parents[1] / "support" / "convert_scenario.py"
COVER = ("routed-full-1-2", "routed-full-2-2", "routed-full-3-2", "ema-full-3-2", "ema-qlora-2-2")
"""Average, copy and live teacher (`routed` has all three) under every stage and adapters over 4-bit weights, from two ranks to
one and back."""
MATRIX = [
    *(f"{weights}-full-{stage}-2" for weights, stage in itertools.product(TEACHERS, (0, 1, 2, 3))),
    *(
        f"ema-{form}-{stage}-2"
        for form in FORMS
        if form != "full"
        for stage in (1, 2, 3)
        if (form, stage) != ("qlora", 3)
    ),
    *(f"ema-full-{stage}-3" for stage in (1, 2, 3)),
]


def assert_equals_unchanged_run(work):
    straight = metrics(work / "straight")
    assert len({line["loss"] for line in straight}) == STEPS
    assert metrics(work / "back") == straight
    trained = weights_of(work / "straight")
    for name, value in weights_of(work / "back").items():
        assert_equal(value, trained[name])
    if "bfloat16" in work.name:  # one rounding is a hundred times the tolerance below
        return
    for run in ("other", "again"):
        assert_close(metrics(work / run), straight)
        for name, value in weights_of(work / run).items():
            torch.testing.assert_close(value, trained[name], atol=1e-6, rtol=1e-5)


def assert_close(actual, expected):
    assert [line.keys() for line in actual] == [line.keys() for line in expected]
    for line, other in zip(actual, expected, strict=True):
        for name in line.keys() - {"padding"}:  # depends on the micro-batches, which each rank forms alone
            close = pytest.approx(other[name], rel=1e-5, abs=1e-5)
            assert line[name] == close, (line["step"], name)


@pytest.fixture(scope="module")
def work(warm, tiny_folder, tmp_path_factory):
    return run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("converted"), COVER)


@pytest.mark.parametrize("name", COVER)
def test_converted_run_equals_the_unchanged_run(work, name):
    assert_equals_unchanged_run(work / name)


@pytest.mark.full
@pytest.mark.timeout(0)
def test_every_teacher_form_and_stage_can_be_converted(warm, tiny_folder, tmp_path):
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, MATRIX)
    for name in MATRIX:
        assert_equals_unchanged_run(tmp_path / name)


def test_converted_checkpoint_is_complete(work):
    folder = work / "ema-full-3-2" / "other" / "checkpoints" / "step_000002"
    converted = manifest.read(folder, hashes=True)
    assert converted.universal
    assert (converted.origin.ranks, converted.step, converted.updates) == (1, 2, 2)
    rank_files = {name for name in converted.files if not name.startswith(("zero/", "zero_pp_rank_"))}
    assert rank_files == {"random_rank_0.json", "teacher_rank_0.safetensors"}
    assert not list(folder.parent.glob(".*")) + list(folder.parent.glob("latest*"))
    # Left out because no rank reads it: the optimizer state of the previous first rank.
    assert (folder / "zero" / "optimizer_state.pt").stat().st_size < 10_000


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
def test_shards_are_redistributed(tmp_path, size):
    """For any two numbers of ranks, each shard has the size that DeepSpeed gives it, and joined they are the parameter."""
    parameter = torch.arange(1.0, size + 1)

    def shards(ranks):
        length = -(-size // ranks)
        return [parameter[rank * length : (rank + 1) * length].clone() for rank in range(ranks)]

    for old_ranks, new_ranks in itertools.product(range(1, 5), repeat=2):
        for rank, part in enumerate(shards(old_ranks)):
            save_file({"p": part}, tmp_path / f"{rank}")
        files = [safe_open(tmp_path / f"{rank}", framework="pt") for rank in range(old_ranks)]
        for rank, part in enumerate(shards(new_ranks)):
            assert_equal(convert.reshard([f.get_slice("p") for f in files], size, rank, new_ranks), part)


def test_additional_rank_starts_its_own_random_stream():
    """A rank that joins must not repeat numbers that the run has drawn already."""

    def draw(*where):
        rng.seed_all(3, *where)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    before = rng.state()
    streams = [draw(0), draw(1), draw(0, 7), draw(1, 7), draw(1, 8)]
    rng.restore(before)
    for draws in zip(*streams, strict=True):
        assert len(set(draws)) == len(streams)


@pytest.fixture(scope="module")
def three_checkpoints(tiny_folder, tmp_path_factory):
    """Spec and folder of a one-rank run under stage 2 with checkpoints of its first three steps."""
    output = OutputSpec(checkpoint_every=1, keep_checkpoints=5, trackers=())
    spec = make_spec(
        tiny_folder,
        teacher=teacher(EmaWeights(update_rate=0.3)),
        training=training(steps=4, zero_stage=2),
        output=output,
    )
    return spec, train(spec, tmp_path_factory.mktemp("three") / "run")


@pytest.fixture
def run(three_checkpoints, tmp_path):
    """A copy of that run to convert; its folder's name does not match itself as a regular expression."""
    return shutil.copytree(three_checkpoints[1], tmp_path / "run+1")


def contents(run):
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def conversion_error(three_checkpoints, run, ranks=2, kind=UnreadableInput):
    """The error of a conversion, which must leave every file as it was."""
    before = contents(run)
    with pytest.raises(kind) as caught:
        convert.convert(three_checkpoints[0], run, ranks, print)
    assert contents(run) == before
    return caught.value


def test_command_converts_and_says_how_to_continue(three_checkpoints, run, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["sdkit", "checkpoint", "convert", str(run), *args])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    newest = run / "checkpoints" / "step_000003"
    code, out, _ = command("--processes", "1")
    assert (code, out) == (0, f"{newest} fits 1 rank already\n")
    code, out, _ = command("--processes", "2")
    assert code == 0
    assert f"{newest} fits 2 ranks now, 1 before" in out
    assert f"`sdkit train SPEC --to {run} --resume --processes 2`" in out
    with pytest.raises(UnreadableInput, match="fits 2 ranks, but there is 1 now") as caught:
        train(three_checkpoints[0], run, silent_console(), resume=True)
    assert f"`sdkit checkpoint convert {run} --processes 1`" in caught.value.hint
    code, _, err = command("--processes", "3")
    assert code == 2
    assert "prompts_per_step is 4, which 3 ranks cannot share equally" in err


def test_indivisible_prompts_are_refused_first(three_checkpoints, tmp_path):
    error = conversion_error(three_checkpoints, tmp_path / "no run", ranks=3)
    assert "which 3 ranks cannot share equally" in error.message
    assert error.hint == "--processes can be 1, 2, 4"


def test_damaged_checkpoint_is_not_read(three_checkpoints, run, monkeypatch):
    """The older checkpoint is converted instead, and a message names the skipped one."""
    read = []
    rewrite = convert.zero_universal.rewrite
    monkeypatch.setattr(
        convert.zero_universal, "rewrite", lambda source, target: [read.append(source.name), rewrite(source, target)]
    )
    damaged = run / "checkpoints" / "step_000003" / "mp_rank_00_model_states.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    messages = []
    assert "step_000002 fits 2 ranks now" in convert.convert(three_checkpoints[0], run, 2, messages.append)
    assert read == ["step_000002"]
    assert "step_000003 is damaged: mp_rank_00_model_states.pt" in messages[0]


def test_checkpoint_of_another_run_is_refused(three_checkpoints, run):
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**provenance, "run": "another"}))
    assert "belongs to another run" in conversion_error(three_checkpoints, run).message


def test_run_without_checkpoint_is_refused(three_checkpoints, run):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint to convert" in conversion_error(three_checkpoints, run).message


def test_run_in_training_cannot_be_converted(three_checkpoints, run):
    status = {"state": "running", "pid": os.getpid(), "process": processes.own_start()}
    (run / "status.json").write_text(json.dumps(status))
    assert f"by process {os.getpid()}" in conversion_error(three_checkpoints, run).message


def test_checkpoint_before_the_first_update_cannot_be_converted(three_checkpoints, run):
    folder = run / "checkpoints" / "step_000003"
    manifest.write(folder, evolve(manifest.read(folder, hashes=False), updates=0))
    error = conversion_error(three_checkpoints, run)
    assert "stands before the first optimizer step" in error.message
    assert "--overwrite" in error.hint


def test_full_disk_leaves_the_run_unchanged(three_checkpoints, run, monkeypatch):
    def full(folder, written):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    error = conversion_error(three_checkpoints, run, kind=BadEnvironment)
    assert error.exit_code == 4
    assert "make room and convert again" in error.hint


def test_interrupted_swap_is_undone(three_checkpoints, run):
    """Between the two renames that put a converted checkpoint in place, no folder has its name."""
    folder = run / "checkpoints" / "step_000003"
    folder.rename(folder.with_name(".old-step_000003"))
    own = manifest.Origin(
        run=json.loads((run / "provenance.json").read_text())["run"],
        spec=manifest.spec_digest(three_checkpoints[0]),
        ranks=1,
    )
    assert resume.newest_checkpoint(run, own, print, hashes=True) == folder
