"""A run that goes on with another number of ranks: it is the run that never changed; and what is refused, with what to do.

The conversions and runs of convert_scenario.py.  Converted there and back a run is the same bit by bit: every master, both
moments, their steps and the teacher's averages came over.  With another number of ranks sums are taken in another order,
so there metrics agree to 1e-5 and weights to 1e-6 (test_ranks.py says why its optimizer allows that).
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
from tinyruns import make_spec, metrics, run_scenario, same, silent, teacher, train, training, weights_of

from sdkit import processes
from sdkit.checkpoints import convert, manifest, resume, rng
from sdkit.cli import main
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.language.specs import EmaWeights, OutputSpec

SCENARIO = Path(__file__).parents[1] / "support" / "convert_scenario.py"
COVER = ("routed-full-1-2", "routed-full-2-2", "routed-full-3-2", "ema-full-3-2")
"""Average, copy and live teacher (`routed` has all three) under every stage, from two ranks to one and back."""
MATRIX = [
    *(f"{weights}-full-{stage}-2" for weights, stage in itertools.product(TEACHERS, (0, 1, 2, 3))),
    *(f"ema-{form}-{stage}-2" for form in FORMS if form != "full" for stage in (1, 2, 3)),
    *(f"ema-full-{stage}-3" for stage in (1, 2, 3)),
]


def assert_as_if_never_changed(work):
    straight = metrics(work / "straight")
    assert len({line["loss"] for line in straight}) == STEPS
    assert metrics(work / "back") == straight
    trained = weights_of(work / "straight")
    for name, value in weights_of(work / "back").items():
        same(value, trained[name])
    if "bfloat16" in work.name:  # a rounding is a hundred times what is compared below
        return
    for run in ("other", "again"):
        assert_close(metrics(work / run), straight)
        for name, value in weights_of(work / run).items():
            torch.testing.assert_close(value, trained[name], atol=1e-6, rtol=1e-5)


def assert_close(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in line.keys() - {"padding"}:  # it is of micro-batches, which are each rank's own
            about = pytest.approx(other[name], rel=1e-5, abs=1e-5)
            assert line[name] == about, (line["step"], name)


@pytest.fixture(scope="module")
def work(warm, tiny_folder, tmp_path_factory):
    return run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("converted"), COVER)


@pytest.mark.parametrize("name", COVER)
def test_a_converted_run_is_as_if_it_never_changed(work, name):
    assert_as_if_never_changed(work / name)


@pytest.mark.full
@pytest.mark.timeout(0)
def test_every_teacher_form_and_stage(warm, tiny_folder, tmp_path):
    run_scenario(warm, SCENARIO, tiny_folder, tmp_path, MATRIX)
    for name in MATRIX:
        assert_as_if_never_changed(tmp_path / name)


def test_a_converted_checkpoint_is_whole(work):
    folder = work / "ema-full-3-2" / "other" / "checkpoints" / "step_000002"
    found = manifest.read(folder, hashes=True)
    assert found.universal
    assert (found.origin.ranks, found.step, found.updates) == (1, 2, 2)
    own = {name for name in found.files if not name.startswith(("zero/", "zero_pp_rank_"))}
    assert own == {"random_rank_0.json", "teacher_rank_0.safetensors"}
    assert not list(folder.parent.glob(".*")) + list(folder.parent.glob("latest*"))
    # What no rank reads is left out: the optimizer's state of the rank that was the first one.
    assert (folder / "zero" / "optimizer_state.pt").stat().st_size < 10_000


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
def test_pieces_are_cut_anew(tmp_path, size):
    """Whatever the numbers of ranks: each has as many elements as DeepSpeed gives it, and joined they are the parameter."""
    whole = torch.arange(1.0, size + 1)

    def pieces(ranks):
        length = -(-size // ranks)
        return [whole[rank * length : (rank + 1) * length].clone() for rank in range(ranks)]

    for before, now in itertools.product(range(1, 5), repeat=2):
        for rank, part in enumerate(pieces(before)):
            save_file({"p": part}, tmp_path / f"{rank}")
        files = [safe_open(tmp_path / f"{rank}", framework="pt") for rank in range(before)]
        for rank, part in enumerate(pieces(now)):
            same(convert.reshard([f.get_slice("p") for f in files], size, rank, now), part)


def test_a_further_rank_begins_streams_of_its_own():
    """Not those that a rank of this number once began: the run has drawn from them."""

    def drawn(*where):
        rng.seed_all(3, *where)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    before = rng.state()
    begun = [drawn(0), drawn(1), drawn(0, 7), drawn(1, 7), drawn(1, 8)]
    rng.restore(before)
    for draws in zip(*begun, strict=True):
        assert len(set(draws)) == len(begun)


# ── what is refused, and what is left where it ends early ─────────────────────────────────────


@pytest.fixture(scope="module")
def three(tiny_folder, tmp_path_factory):
    """A run of one rank under stage 2 that has checkpoints of its first three steps."""
    output = OutputSpec(checkpoint_every=1, keep_checkpoints=5, tensorboard=False)
    spec = make_spec(
        tiny_folder,
        teacher=teacher(EmaWeights(update_rate=0.3)),
        training=training(steps=4, zero_stage=2),
        output=output,
    )
    return spec, train(spec, tmp_path_factory.mktemp("three") / "run")


@pytest.fixture
def run(three, tmp_path):
    """A copy of it, to be converted; in a folder whose name is no regular expression of itself."""
    return shutil.copytree(three[1], tmp_path / "run+1")


def contents(run):
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def refused(three, run, ranks=2, kind=UnreadableInput):
    """The error of a conversion that must leave everything as it was."""
    before = contents(run)
    with pytest.raises(kind) as caught:
        convert.convert(three[0], run, ranks, print)
    assert contents(run) == before
    return caught.value


def test_the_command_converts_and_says_how_to_go_on(three, run, monkeypatch, capsys):
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
        train(three[0], run, silent(), resume=True)
    assert f"`sdkit checkpoint convert {run} --processes 1`" in caught.value.hint
    code, _, err = command("--processes", "3")
    assert code == 2
    assert "prompts_per_step is 4, which 3 ranks cannot share equally" in err


def test_prompts_that_cannot_be_dealt_are_refused_first(three, tmp_path):
    error = refused(three, tmp_path / "no run", ranks=3)
    assert "which 3 ranks cannot share equally" in error.message
    assert error.hint == "--processes can be 1, 2, 4"


def test_nothing_is_read_of_a_damaged_one(three, run, monkeypatch):
    """The older one is converted instead, and what was passed over is said."""
    read = []
    rewrite = convert.zero_universal.rewrite
    monkeypatch.setattr(
        convert.zero_universal, "rewrite", lambda source, target: [read.append(source.name), rewrite(source, target)]
    )
    spoilt = run / "checkpoints" / "step_000003" / "mp_rank_00_model_states.pt"
    held = bytearray(spoilt.read_bytes())
    held[len(held) // 2] ^= 1
    spoilt.write_bytes(held)
    said = []
    assert "step_000002 fits 2 ranks now" in convert.convert(three[0], run, 2, said.append)
    assert read == ["step_000002"]
    assert "step_000003 is damaged: mp_rank_00_model_states.pt" in said[0]


def test_a_foreign_one_is_refused(three, run):
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**facts, "run": "another"}))
    assert "belongs to another run" in refused(three, run).message


def test_a_run_without_one_is_refused(three, run):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint to convert" in refused(three, run).message


def test_a_run_that_is_being_trained_is_refused(three, run):
    status = {"state": "running", "pid": os.getpid(), "process": processes.own_start()}
    (run / "status.json").write_text(json.dumps(status))
    assert f"by process {os.getpid()}" in refused(three, run).message


def test_before_the_first_update_there_is_nothing_to_convert(three, run):
    folder = run / "checkpoints" / "step_000003"
    manifest.write(folder, evolve(manifest.read(folder, hashes=False), updates=0))
    error = refused(three, run)
    assert "stands before the first optimizer step" in error.message
    assert "--overwrite" in error.hint


def test_a_full_disk_leaves_what_was_there(three, run, monkeypatch):
    def full(folder, found):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    error = refused(three, run, kind=BadEnvironment)
    assert error.exit_code == 4
    assert "make room and convert again" in error.hint


def test_a_swap_that_was_cut_short_is_undone(three, run):
    """Between the two renames that put a converted checkpoint in its place, neither has the name."""
    folder = run / "checkpoints" / "step_000003"
    folder.rename(folder.with_name(".old-step_000003"))
    own = manifest.Origin(
        run=json.loads((run / "provenance.json").read_text())["run"], spec=manifest.spec_digest(three[0]), ranks=1
    )
    assert resume.newest_checkpoint(run, own, print, hashes=True) == folder
