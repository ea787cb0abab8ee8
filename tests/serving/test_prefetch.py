"""Prefetched rollouts: which weights sample which batch, and that a resumed run equals an uninterrupted one."""

import threading
import time

import pytest
import torch
from attrs import evolve
from ranks_scenario import SMOOTH
from tinyruns import (
    collect,
    distil,
    interrupted_before_step,
    lines,
    metrics,
    prepare_rollouts,
    run_two_ranks,
    train,
    train_step,
    training,
    weights_of,
    with_evaluation,
)

pytest.importorskip("uvicorn", reason="the servers of these tests run on uvicorn")
from test_servers import served_by
from tinyservers import TinySampler

from sdkit.language.errors import ProcessDied
from sdkit.language.specs import ImportanceSpec, OutputSpec, SamplerRatio
from sdkit.serving import client, pool
from sdkit.train import loop

STEPS = 5
CORRECTED = distil(importance=ImportanceSpec(sampler=SamplerRatio(cap=2.0, level="token")))


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(client, "FIRST_RETRY_DELAY", 0.01)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.05)


@pytest.fixture
def server(tiny_folder, tmp_path):
    sampler = TinySampler(tiny_folder, tmp_path / "weights")
    yield sampler
    sampler.close()


def prefetching_spec(server, tmp_path, folder, batches=1, **changes):
    parts = {"losses": CORRECTED, "training": training(steps=STEPS)} | changes
    spec = served_by([server], tmp_path, folder, **parts)
    return evolve(spec, rollout=evolve(spec.rollout, max_staleness=batches))


def versions(folder):
    """The policy version of every recorded batch."""
    return [
        {line["policy_version"] for line in lines(path)} for path in sorted((folder / "rollouts").glob("step_*.jsonl"))
    ]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_batches_are_sampled_by_weights_of_earlier_steps(server, tiny_folder, tmp_path, batches):
    run = train(prefetching_spec(server, tmp_path, tiny_folder, batches), tmp_path / "run")
    staleness = [min(batches, step) for step in range(STEPS)]
    assert versions(run) == [{step - lag} for step, lag in enumerate(staleness)]
    requested_versions = [a["weights"]["version"] for a in server.requests]
    assert requested_versions == [step - lag for step, lag in enumerate(staleness) for _ in range(4)]
    trained = metrics(run)
    if batches:
        assert [line["rollout/staleness"] for line in trained] == staleness
    assert all(line["rollout/canary_mean"] < 1e-5 for line in trained)
    assert list((tmp_path / "weights").iterdir()) == []


def test_staleness_counts_every_update(server, tiny_folder, tmp_path):
    spec = prefetching_spec(server, tmp_path, tiny_folder, training=training(steps=STEPS, updates_per_rollout=2))
    run = train(spec, tmp_path / "run")
    assert versions(run) == [{2 * max(0, step - 1)} for step in range(STEPS)]
    assert [line["rollout/staleness"] for line in metrics(run)] == [0, 2, 2, 2, 2]


def test_prefetched_rollouts_come_from_the_named_weights(server, tiny_folder, tmp_path, open_tiny):
    """Prefetched batch 2 equals batch 2 sampled by a trainer with the weights before batch 1's update."""
    trainer = open_tiny(prefetching_spec(server, tmp_path, tiny_folder))
    completions = []
    for step in range(3):
        collected = collect(trainer, step)
        completions.append([r.completion_ids for r in collected.batch])
        if step == 1:
            plain = served_by([server], tmp_path, tiny_folder, losses=CORRECTED)
            other = open_tiny(plain)
            with torch.no_grad():
                parameters = dict(trainer.models.student.model.named_parameters())
                for name, parameter in other.models.student.model.named_parameters():
                    parameter.copy_(parameters[name])
            expected = [r.completion_ids for r in collect(other, 2).batch]
        _update(trainer, collected)
    assert completions[2] == expected
    assert completions[1] != completions[2]


def _update(trainer, collected):
    train_step(trainer, prepare_rollouts(trainer, collected.batch))
    trainer.progress.step += 1


def test_sampling_overlaps_training(server, tiny_folder, tmp_path, monkeypatch):
    """While the student trains on batch 1, batch 2 is sampled: its request arrives before the step ends."""
    spec = prefetching_spec(server, tmp_path, tiny_folder)
    began = threading.Event()
    server.fault = lambda number: began.set() if number >= 8 else None
    overlaps = []
    update = loop._update

    def wait_for_sampling(trainer, *args):
        if trainer.progress.step == 1:
            overlaps.append(began.wait(20))
        return update(trainer, *args)

    monkeypatch.setattr(loop, "_update", wait_for_sampling)
    train(spec, tmp_path / "run")
    assert overlaps == [True]


def test_evaluation_uses_current_weights_and_changes_no_batch(server, tiny_folder, tmp_path):
    plain = prefetching_spec(server, tmp_path, tiny_folder)
    without = train(plain, tmp_path / "without")
    server.requests.clear()
    evaluated_run = train(with_evaluation(plain, every=2), tmp_path / "measured")
    assert versions(evaluated_run) == versions(without)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(evaluated_run / name), lines(without / name)
        ignored = {"reward", "scores"}
        assert [{k: v for k, v in a.items() if k not in ignored} for a in ours] == [
            {k: v for k, v in b.items() if k not in ignored} for b in theirs
        ]
    prompts = {a["weights"]["version"] for a in server.requests if a["seed"] is None}
    assert prompts == {0, 2, 4, 5}  # the evaluations decode greedily


@pytest.mark.parametrize("batches", [1, 2])
def test_resumed_run_equals_the_uninterrupted_run_on_another_server(server, tiny_folder, tmp_path, batches):
    output = OutputSpec(trackers=(), checkpoint_every=2)
    spec = prefetching_spec(server, tmp_path, tiny_folder, batches, output=output)
    uninterrupted = train(spec, tmp_path / "uninterrupted")
    cut = tmp_path / "cut"
    with interrupted_before_step(3):
        train(spec, cut)
    prefetched = lines(cut / "checkpoints" / "step_000002" / "ahead.jsonl")
    assert [line["batch"] for line in prefetched] == list(range(2, 2 + batches))
    assert [line["policy_version"] for line in prefetched] == [max(0, b - batches) for b in range(2, 2 + batches)]
    server.kill()
    other = TinySampler(tiny_folder, tmp_path / "weights")
    other_backend = evolve(spec.rollout.backend, urls=(other.url,))
    try:
        on_other_server = evolve(spec, rollout=evolve(spec.rollout, backend=other_backend))
        train(on_other_server, cut, resume=True)
    finally:
        other.close()
    assert metrics(cut) == metrics(uninterrupted)
    ours, theirs = weights_of(cut), weights_of(uninterrupted)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for number in range(STEPS):
        name = f"rollouts/step_{number:06d}.jsonl"
        assert lines(cut / name) == lines(uninterrupted / name)
    assert len(other.requests) == 4 * (STEPS - 2 - batches)  # prefetched batches are not requested again


def test_failure_of_the_prefetch_thread_ends_the_run(server, tiny_folder, tmp_path):
    spec = prefetching_spec(server, tmp_path, tiny_folder)
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


def test_restarted_server_changes_nothing(server, tiny_folder, tmp_path, capsys):
    spec = prefetching_spec(server, tmp_path, tiny_folder)
    expected = train(spec, tmp_path / "uninterrupted")

    def fault(number):
        if number >= already_served + 9:
            server.fault = None
            server.kill(wait=False)
            threading.Timer(0.3, server.start).start()

    already_served = len(server.requests)
    server.fault = fault
    restarted = train(spec, tmp_path / "again")
    assert metrics(restarted) == metrics(expected)
    assert "is back, with weights" in capsys.readouterr().err
    warnings = lines(restarted / "warnings.jsonl")
    assert "rollout_server" in {line["wire"] for line in warnings}


def test_two_ranks_sample_like_one_and_fail_together(warm, server, tiny_folder, tmp_path):
    output = OutputSpec(trackers=(), checkpoint_every=2)
    spec = prefetching_spec(server, tmp_path, tiny_folder, output=output, optimizer=SMOOTH)
    alone = train(spec, tmp_path / "alone")
    done = run_two_ranks(warm, spec, tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert versions(tmp_path / "both") == versions(alone)
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = lines(tmp_path / "both" / name), lines(alone / name)
        assert [a["completion_ids"] for a in ours] == [b["completion_ids"] for b in theirs]
    prefetched = lines(tmp_path / "both" / "checkpoints" / "step_000004" / "ahead.jsonl")
    assert [(line["batch"], len(line["completions"])) for line in prefetched] == [(4, 4)]

    backend = evolve(spec.rollout.backend, deadline_seconds=1.0)
    short_deadline = evolve(spec, rollout=evolve(spec.rollout, backend=backend))
    already_served = len(server.requests)
    server.fault = lambda number: server.kill(wait=False) if number == already_served + 9 else None
    done = run_two_ranks(warm, short_deadline, tmp_path / "ended")
    assert done.returncode == 6, done.stderr[-3000:]
    assert f"no rollout server for 1 s: {server.url}" in done.stderr
