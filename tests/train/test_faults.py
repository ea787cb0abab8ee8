"""Requests to stop wherever they come, and faults of memory, disk, processes and numbers: how a run ends, what it leaves."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tinyruns import (
    advance,
    evaluated,
    inline,
    lines,
    make_spec,
    masters,
    metrics,
    rollout,
    run_scenario,
    same,
    teacher,
    train,
    training,
    weights_of,
)

from sdkit.language.errors import (
    INTERRUPTED,
    BadData,
    BadEnvironment,
    NumericsGuard,
    OutOfMemory,
    ProcessDied,
    Stopped,
)
from sdkit.language.specs import EmaWeights, Suite, Table
from sdkit.train import loop, stop_requests
from sdkit.train.step import LossNotFinite

SCENARIO = Path(__file__).parents[1] / "support" / "fault_scenario.py"


def status(folder):
    return json.loads((folder / "status.json").read_text())


# ── asked to stop ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def spec(tiny_folder):
    spec = make_spec(
        tiny_folder,
        teacher=teacher(EmaWeights(update_rate=0.3)),
        rollout=rollout(max_new_tokens=4),
        training=training(steps=2, prompts_per_step=2),
    )
    suite = Suite(data=inline(2, 100), score="right", loss_prompts=1)
    return evaluated(spec, every=1, teacher_lift=1, suites=Table({"held": suite}))


@pytest.fixture(scope="module")
def straight(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("straight") / "run")


def send(number):
    """A signal to this process; the sleep ends early where its handler raises."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def at_call(monkeypatch, owner, name, call, how):
    """Have `how` happen before this call, counted from 1, of a function."""
    whole, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == call:
            how()
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, counted)


ASKED = {
    "first evaluation": (loop, "evaluate", 1, 0),
    "teacher lift": (loop, "teacher_lift", 1, 0),
    "evaluation after a step": (loop, "evaluate", 2, 1),
    "last evaluation": (loop, "evaluate", 3, 2),
    "rollout": (loop, "collect_rollouts", 1, 1),
    "update": (loop, "train_step", 1, 1),
}


REQUESTS = [*((where, signal.SIGTERM) for where in ASKED), ("rollout", signal.SIGINT)]


@pytest.mark.parametrize(("where", "number"), REQUESTS)
def test_a_request_is_heeded_wherever_it_comes(spec, straight, tmp_path, monkeypatch, where, number):
    owner, name, call, step = ASKED[where]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: send(number))
        with pytest.raises(Stopped, match=f"stopped after step {step}") as caught:
            train(spec, folder)
    assert caught.value.exit_code == 7
    assert status(folder)["state"] == "stopped"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    train(spec, folder, resume=True)
    assert metrics(folder) == metrics(straight)
    for key, value in weights_of(folder).items():
        same(value, weights_of(straight)[key])


def test_a_second_interrupt_ends_a_run_at_once(spec, tmp_path, monkeypatch):
    def twice():
        send(signal.SIGINT)
        send(signal.SIGINT)

    at_call(monkeypatch, loop, "collect_rollouts", 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == "interrupted"


def test_a_request_while_the_model_is_written_changes_nothing(spec, tmp_path, monkeypatch):
    from sdkit.checkpoints import checkpoint

    at_call(monkeypatch, checkpoint, "save_model", 1, lambda: send(signal.SIGTERM))
    assert status(train(spec, tmp_path / "run"))["state"] == "done"


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests.stop_requests() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_command_ends_with_130(monkeypatch, capsys):
    from sdkit import cli

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


# ── faults ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(warm, tiny_folder, tmp_path_factory):
    """How every run of fault_scenario.py ended."""
    work = run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("faults"))
    return {"work": work, **json.loads((work / "found.json").read_text())}


def assert_same_run(found, name, straight):
    assert found[name]["codes"] == [0] * len(found[name]["codes"])
    folders = [found["work"] / each.removesuffix(", resumed") for each in (name, straight)]
    assert metrics(folders[0]) == metrics(folders[1])
    for key, value in weights_of(folders[1]).items():
        same(weights_of(folders[0])[key], value)


def test_a_rank_without_memory_says_what_to_lower(found):
    kept = found["no_memory"]
    assert kept["codes"] == [ProcessDied.exit_code, OutOfMemory.exit_code]
    assert "rank 1: error: out of memory: " in kept["said"][1]
    assert "lower training.micro_batch_tokens" in kept["said"][1]
    assert "lost rank 1" in kept["said"][0]


def test_a_full_disk_of_one_rank_stops_all_and_spoils_nothing(found):
    kept = found["full_disk"]
    assert BadEnvironment.exit_code in kept["codes"]
    assert kept["codes"][0] != 0
    assert "cannot write" in "".join(kept["said"])
    assert kept["checkpoints"] == ["step_000001", "step_000002"]
    assert_same_run(found, "full_disk, resumed", "straight 2")


def test_a_reward_that_hangs_is_named(found):
    kept = found["hang"]
    assert kept["codes"] == [ProcessDied.exit_code, BadData.exit_code]
    assert "faulty in reward.py took more than 2 s on row" in kept["said"][1]


@pytest.mark.parametrize(("name", "lost"), [("kill", 1), ("kill the first", 0), ("freeze", 1)])
def test_ranks_that_are_left_end_and_say_who_is_gone(found, name, lost):
    kept = found[name]
    left = 1 - lost
    assert kept["codes"][lost] == -signal.SIGKILL
    assert kept["codes"][left] == ProcessDied.exit_code
    assert f"error: lost rank {lost}, which ended or was silent for too long" in kept["said"][left]
    assert kept["seconds"][left] < 60


def test_a_run_goes_on_after_a_rank_was_killed(found):
    assert_same_run(found, "kill, resumed", "straight 2")


def test_a_killed_run_is_named_by_the_next(found):
    assert found["kill alone"]["codes"] == [-signal.SIGKILL]
    assert found["kill alone"]["status"]["state"] == "running"
    assert "exited without updating its status after step 2" in found["kill alone, resumed"]["said"][0]
    assert "dmesg" in found["kill alone, resumed"]["said"][0]
    assert_same_run(found, "kill alone, resumed", "straight 1")


def test_a_request_to_one_rank_stops_all_in_good_order(found):
    kept = found["terminate"]
    assert kept["codes"] == [Stopped.exit_code] * 2
    assert kept["status"]["state"] == "stopped"
    assert kept["checkpoints"] == ["step_000002", "step_000003"]
    assert "continue with --resume" in kept["said"][0]
    assert_same_run(found, "terminate, resumed", "straight 2")


def test_an_interrupt_is_heeded_and_a_second_one_at_once(found):
    once, twice = found["interrupt alone"], found["interrupt_twice alone"]
    assert once["codes"] == [Stopped.exit_code]
    assert once["checkpoints"] == ["step_000002", "step_000003"]
    assert twice["codes"] == [INTERRUPTED]
    assert twice["status"]["state"] == "failed"
    assert twice["checkpoints"] == ["step_000001", "step_000002"]


# ── numbers that are not finite ───────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_ends_a_run_before_its_step(found):
    kept, folder = found["not finite"], found["work"] / "not finite"
    assert kept["codes"] == [NumericsGuard.exit_code] * 2
    assert kept["status"] == kept["status"] | {"state": "failed", "step": 1}
    assert "the loss is not finite, in step 2" in kept["said"][0]
    assert f"sdkit replay {folder}@1" in kept["said"][0].replace("\n", "")
    (bad,) = (folder / "bad_batches").iterdir()
    failed, whole = lines(bad), lines(folder / "rollouts" / bad.name)
    assert len(whole) == 4
    assert all(record in whole for record in failed)


def test_the_batch_that_ended_a_run_can_be_replayed(found):
    assert found["replayed"]["codes"] == [NumericsGuard.exit_code] * 2
    assert "the loss is not finite, in step 2" in found["replayed"]["said"][0]
    assert found["replayed otherwise"]["codes"] == [0, 0]
    assert found["replayed otherwise"]["status"]["step"] == 2


def test_a_loss_that_is_not_finite_moves_no_weight(open_tiny):
    world = open_tiny()
    advance(world, 1)
    before = masters(world)
    with torch.no_grad():
        spoilt = world.models.student.head[0, 0].item()
        world.models.student.head[0, 0] = float("inf")
    with pytest.raises(LossNotFinite):
        advance(world, 1)
    with torch.no_grad():
        world.models.student.head[0, 0] = spoilt
    assert world.progress.optimizer_steps == 1
    for name, value in masters(world).items():
        same(value, before[name])
