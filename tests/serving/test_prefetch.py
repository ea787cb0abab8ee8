"""Rollouts ahead of their turn: which weights sample which batch, and that a resumed run is the uninterrupted one."""

import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from attrs import evolve
from ranks_scenario import SMOOTH
from tinyruns import distil, evaluated, lines, metrics, prepare_rollouts, train, train_step, training, weights_of

pytest.importorskip("uvicorn", reason="the servers of these tests run on uvicorn")
from test_servers import drawn, served_by
from tinyservers import TinySampler

from sdkit.language.errors import ProcessDied
from sdkit.language.resolved import resolved
from sdkit.language.specs import ImportanceSpec, OutputSpec, SamplerRatio
from sdkit.serving import client, pool
from sdkit.train import loop

ON_RANKS = Path(__file__).parents[1] / "support" / "command_on_ranks.py"
STEPS = 5
CORRECTED = distil(importance=ImportanceSpec(sampler=SamplerRatio(cap=2.0, level="token")))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_RETRY_DELAY", 0.01)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.05)


@pytest.fixture
def server(tiny_folder, tmp_path):
    started = TinySampler(tiny_folder, tmp_path / "weights")
    yield started
    started.close()


def ahead(server, tmp_path, folder, batches=1, **changes):
    parts = {"losses": CORRECTED, "training": training(steps=STEPS)} | changes
    spec = served_by([server], tmp_path, folder, **parts)
    return evolve(spec, rollout=evolve(spec.rollout, max_staleness=batches))


def versions(folder):
    """The policy version of every recorded batch."""
    return [
        {line["policy_version"] for line in lines(path)} for path in sorted((folder / "rollouts").glob("step_*.jsonl"))
    ]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_batch_is_sampled_by_the_weights_of_so_many_steps_before(server, tiny_folder, tmp_path, batches):
    run = train(ahead(server, tmp_path, tiny_folder, batches), tmp_path / "run")
    behind = [min(batches, step) for step in range(STEPS)]
    assert versions(run) == [{step - late} for step, late in enumerate(behind)]
    asked = [a["weights"]["version"] for a in server.asked]
    assert asked == [step - late for step, late in enumerate(behind) for _ in range(4)]
    trained = metrics(run)
    if batches:
        assert [line["rollout/staleness"] for line in trained] == behind
    assert all(line["rollout/canary_mean"] < 1e-5 for line in trained)
    assert list((tmp_path / "weights").iterdir()) == []


def test_two_updates_a_batch_count_as_two(server, tiny_folder, tmp_path):
    spec = ahead(server, tmp_path, tiny_folder, training=training(steps=STEPS, updates_per_rollout=2))
    run = train(spec, tmp_path / "run")
    assert versions(run) == [{2 * max(0, step - 1)} for step in range(STEPS)]
    assert [line["rollout/staleness"] for line in metrics(run)] == [0, 2, 2, 2, 2]


def test_the_rollouts_are_those_of_the_weights_that_are_named(server, tiny_folder, tmp_path, open_tiny):
    """Batch 2 under look-ahead against batch 2 of a world that stands where batch 1 stood."""
    world = open_tiny(ahead(server, tmp_path, tiny_folder))
    held = []
    for step in range(3):
        gathered = drawn(world, step)
        held.append([r.completion_ids for r in gathered.batch])
        if step == 1:
            plain = served_by([server], tmp_path, tiny_folder, losses=CORRECTED)
            other = open_tiny(plain)
            with torch.no_grad():
                own = dict(world.models.student.model.named_parameters())
                for name, parameter in other.models.student.model.named_parameters():
                    parameter.copy_(own[name])
            expected = [r.completion_ids for r in drawn(other, 2).batch]
        _update(world, gathered)
    assert held[2] == expected
    assert held[1] != held[2]


def _update(world, gathered):
    train_step(world, prepare_rollouts(world, gathered.batch))
    world.progress.step += 1


def test_sampling_overlaps_training(server, tiny_folder, tmp_path, monkeypatch):
    """While batch 1 trains batch 2 is being sampled: the server is asked before the step has ended."""
    spec = ahead(server, tmp_path, tiny_folder)
    began = threading.Event()
    server.fault = lambda number: began.set() if number >= 8 else None
    seen = []
    update = loop._update

    def watched(world, report, gathered, part):
        if world.progress.step == 1:
            seen.append(began.wait(20))
        return update(world, report, gathered, part)

    monkeypatch.setattr(loop, "_update", watched)
    train(spec, tmp_path / "run")
    assert seen == [True]


def test_evaluation_is_of_the_current_weights_and_changes_no_batch(server, tiny_folder, tmp_path):
    plain = ahead(server, tmp_path, tiny_folder)
    without = train(plain, tmp_path / "without")
    server.asked.clear()
    measured = train(evaluated(plain, every=2), tmp_path / "measured")
    assert versions(measured) == versions(without)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(measured / name), lines(without / name)
        drop = {"reward"}
        assert [{k: v for k, v in a.items() if k not in drop} for a in ours] == [
            {k: v for k, v in b.items() if k not in drop} for b in theirs
        ]
    prompts = {a["weights"]["version"] for a in server.asked if a["seed"] is None}
    assert prompts == {0, 2, 4, 5}  # greedy decoding of the evaluations


@pytest.mark.parametrize("batches", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_also_on_another_server(
    server, tiny_folder, tmp_path, batches, monkeypatch
):
    output = OutputSpec(tensorboard=False, checkpoint_every=2)
    spec = ahead(server, tmp_path, tiny_folder, batches, output=output)
    whole = train(spec, tmp_path / "whole")
    cut = tmp_path / "cut"
    step = loop._train_on_batch

    def dies(world, report, number):
        if number == 3:
            raise KeyboardInterrupt
        step(world, report, number)

    monkeypatch.setattr(loop, "_train_on_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        train(spec, cut)
    waiting = lines(cut / "checkpoints" / "step_000002" / "ahead.jsonl")
    assert [line["batch"] for line in waiting] == list(range(2, 2 + batches))
    assert [line["policy_version"] for line in waiting] == [max(0, b - batches) for b in range(2, 2 + batches)]
    monkeypatch.setattr(loop, "_train_on_batch", step)
    server.kill()
    other = TinySampler(tiny_folder, tmp_path / "weights")
    elsewhere = evolve(spec.rollout.backend, urls=(other.url,))
    try:
        moved = evolve(spec, rollout=evolve(spec.rollout, backend=elsewhere))
        train(moved, cut, resume=True)
    finally:
        other.close()
    assert metrics(cut) == metrics(whole)
    ours, theirs = weights_of(cut), weights_of(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for number in range(STEPS):
        name = f"rollouts/step_{number:06d}.jsonl"
        assert lines(cut / name) == lines(whole / name)
    assert len(other.asked) == 4 * (STEPS - 2 - batches)  # what waited is not asked again


def test_a_failure_of_the_thread_ends_the_run_in_its_own_words(server, tiny_folder, tmp_path):
    spec = ahead(server, tmp_path, tiny_folder)
    backend = evolve(spec.rollout.backend, deadline_seconds=0.5)
    spec = evolve(spec, rollout=evolve(spec.rollout, backend=backend))

    def fault(number):
        if number == 9:
            server.kill(wait=False)

    server.fault = fault
    started = time.monotonic()
    with pytest.raises(ProcessDied, match="no rollout server") as caught:
        train(spec, tmp_path / "run")
    assert server.url in str(caught.value)
    assert time.monotonic() - started < 60
    status = (tmp_path / "run" / "status.json").read_text()
    assert "failed" in status
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_server_that_is_started_anew_changes_nothing(server, tiny_folder, tmp_path, capsys):
    spec = ahead(server, tmp_path, tiny_folder)
    whole = train(spec, tmp_path / "whole")

    def fault(number):
        if number >= asked + 9:
            server.fault = None
            server.kill(wait=False)
            threading.Timer(0.3, server.start).start()

    asked = len(server.asked)
    server.fault = fault
    again = train(spec, tmp_path / "again")
    assert metrics(again) == metrics(whole)
    assert "is back, with weights" in capsys.readouterr().err
    told = lines(again / "warnings.jsonl")
    assert "rollout_server" in {line["wire"] for line in told}


def on_two_ranks(warm, spec, folder):
    """The command line on two ranks; stage 3, so that the weights come together for the file."""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(resolved(spec)))
    return warm.run(ON_RANKS, 2, folder, "train", path, "--to", folder, "training.zero_stage=3")


def test_two_ranks_sample_as_one_and_end_together(warm, server, tiny_folder, tmp_path):
    output = OutputSpec(tensorboard=False, checkpoint_every=2)
    spec = ahead(server, tmp_path, tiny_folder, output=output, optimizer=SMOOTH)
    alone = train(spec, tmp_path / "alone")
    done = on_two_ranks(warm, spec, tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert versions(tmp_path / "both") == versions(alone)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(tmp_path / "both" / name), lines(alone / name)
        assert [a["completion_ids"] for a in ours] == [b["completion_ids"] for b in theirs]
    waiting = lines(tmp_path / "both" / "checkpoints" / "step_000004" / "ahead.jsonl")
    assert [(line["batch"], len(line["completions"])) for line in waiting] == [(4, 4)]

    backend = evolve(spec.rollout.backend, deadline_seconds=1.0)
    brief = evolve(spec, rollout=evolve(spec.rollout, backend=backend))
    asked = len(server.asked)
    server.fault = lambda number: server.kill(wait=False) if number == asked + 9 else None
    done = on_two_ranks(warm, brief, tmp_path / "ended")
    assert done.returncode == 6, done.stderr[-3000:]
    assert f"no rollout server for 1 s: {server.url}" in done.stderr
