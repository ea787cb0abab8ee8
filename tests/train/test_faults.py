"""Requests to stop in every phase, and faults of memory, disk, processes and numbers: how a run ends, what it leaves."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from attrs import evolve
from tinyruns import (
    advance,
    assert_equal,
    inline,
    lines,
    make_spec,
    masters,
    metrics,
    read_status,
    rollout,
    run_scenario,
    silent_console,
    teacher,
    train,
    training,
    weights_of,
    with_evaluation,
)

from sdkit.language.errors import (
    INTERRUPTED,
    BadData,
    BadEnvironment,
    Diverged,
    NumericsGuard,
    OutOfMemory,
    ProcessDied,
    Stopped,
    UnreadableInput,
)
from sdkit.language.specs import EmaWeights, OutputSpec, Suite, Table
from sdkit.train import loop, stop_requests
from sdkit.train.metrics import step_metrics
from sdkit.train.step import LossNotFinite

SCENARIO = Path(__file__).parents[1] / "support" / "fault_scenario.py"


@pytest.fixture(scope="module")
def spec(tiny_folder):
    spec = make_spec(
        tiny_folder,
        teacher=teacher(EmaWeights(update_rate=0.3)),
        rollout=rollout(max_new_tokens=4),
        training=training(steps=2, prompts_per_step=2),
    )
    suite = Suite(data=inline(2, 100), score="right", loss_prompts=1)
    return with_evaluation(spec, every=1, teacher_lift=1, suites=Table({"held_out": suite}))


@pytest.fixture(scope="module")
def straight(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("straight") / "run")


def send(number):
    """Send a signal to this process; the sleep ends early if the handler raises."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def run_before_call(monkeypatch, owner, name, call, action):
    """Run `action` before call number `call` (from 1) of a function."""
    original, calls = getattr(owner, name), []

    def count_calls(*args, **options):
        calls.append(None)
        if len(calls) == call:
            action()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, count_calls)


PHASES = {
    "first evaluation": (loop, "evaluate", 1, 0),
    "teacher lift": (loop, "teacher_lift", 1, 0),
    "evaluation after a step": (loop, "evaluate", 2, 1),
    "last evaluation": (loop, "evaluate", 3, 2),
    "rollout": (loop, "collect_rollouts", 1, 1),
    "update": (loop, "train_step", 1, 1),
}


ANSWERS = {
    "update": "stopping after this step",
    "evaluation": "stopping: the evaluation is abandoned, --resume repeats it",
}
REQUESTS = [*((where, signal.SIGTERM) for where in PHASES), ("rollout", signal.SIGINT)]


@pytest.mark.parametrize(("phase", "number"), REQUESTS)
def test_stop_request_is_obeyed_in_every_phase(spec, straight, tmp_path, monkeypatch, phase, number):
    owner, name, call, step = PHASES[phase]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        run_before_call(patch, owner, name, call, lambda: send(number))
        with pytest.raises(Stopped, match=f"stopped after step {step}") as caught:
            train(spec, folder, console := silent_console())
    assert caught.value.exit_code == 7
    assert not caught.value.is_failure
    assert ANSWERS["update" if phase in ("rollout", "update") else "evaluation"] in console.file.getvalue()
    assert read_status(folder)["state"] == "stopped"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    train(spec, folder, console := silent_console(), resume=True)
    assert f"resuming after step {step}, from {folder}/checkpoints/step_{step:06d}" in console.file.getvalue()
    first, second = json.loads((folder / "provenance.json").read_text())["attempts"]
    assert (first["ended"]["state"], first["ended"]["step"], second["after_step"]) == ("stopped", step, step)
    assert metrics(folder) == metrics(straight)
    for key, value in weights_of(folder).items():
        assert_equal(value, weights_of(straight)[key])


def test_second_interrupt_ends_a_run_at_once(spec, tmp_path, monkeypatch):
    def interrupt_twice():
        send(signal.SIGINT)
        send(signal.SIGINT)

    run_before_call(monkeypatch, loop, "collect_rollouts", 1, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "run")
    assert read_status(tmp_path / "run")["state"] == "interrupted"


def test_stop_request_during_the_final_save_changes_nothing(spec, tmp_path, monkeypatch):
    from sdkit.checkpoints import checkpoint

    run_before_call(monkeypatch, checkpoint, "save_model", 1, lambda: send(signal.SIGTERM))
    assert read_status(train(spec, tmp_path / "run"))["state"] == "done"


def test_stop_request_while_a_checkpoint_is_saved_is_obeyed_before_the_next_step(spec, tmp_path, monkeypatch):
    from sdkit.checkpoints import checkpoint

    run_before_call(monkeypatch, checkpoint, "save", 1, lambda: send(signal.SIGINT))
    saving = evolve(spec, evaluation=None, output=OutputSpec(checkpoint_every=1, trackers=()))
    with pytest.raises(Stopped, match="stopped after step 1"):
        train(saving, tmp_path / "run", console := silent_console())
    assert "stopping after the checkpoint is saved; again to abort" in console.file.getvalue()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    answers = []
    with stop_requests.stop_requests(answers.append) as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before
    assert answers == ["stopping after the current work"]


@pytest.mark.parametrize(("seconds", "left"), [(9.2, ", 9 s left"), (None, ""), (0.1, "")])
def test_interrupt_is_answered_at_once(seconds, left):
    answers = []
    with stop_requests.stop_requests(answers.append) as stop, stop.during("this step", seconds):
        send(signal.SIGINT)
        assert answers == [f"stopping after this step{left}; again to abort"]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_run_expects_a_step_to_take_as_long_as_the_latest(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "step_metrics", lambda *args: step_metrics(*args) | {"time/step": 100.0})
    run_before_call(monkeypatch, loop, "collect_rollouts", 2, lambda: send(signal.SIGINT))
    quick = evolve(spec, evaluation=None)
    with pytest.raises(Stopped):
        train(
            evolve(quick, training=training(steps=4, prompts_per_step=2)),
            tmp_path / "run",
            console := silent_console(),
        )
    assert "stopping after this step, 100 s left; again to abort" in console.file.getvalue()


def test_interrupted_command_exits_with_130(monkeypatch, capsys):
    from sdkit import cli

    def raise_interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", raise_interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture(scope="module")
def results(warm, tiny_folder, tmp_path_factory):
    """Results of fault_scenario.py: how each run ended."""
    work = run_scenario(warm, SCENARIO, tiny_folder, tmp_path_factory.mktemp("faults"), timeout=400)
    return {"work": work, **json.loads((work / "results.json").read_text())}


def assert_same_run(results, name, straight):
    assert results[name]["codes"] == [0] * len(results[name]["codes"])
    folders = [results["work"] / each.removesuffix(", resumed") for each in (name, straight)]
    assert metrics(folders[0]) == metrics(folders[1])
    for key, value in weights_of(folders[1]).items():
        assert_equal(weights_of(folders[0])[key], value)


def test_rank_out_of_memory_says_what_to_lower(results):
    result = results["no_memory"]
    assert result["codes"] == [ProcessDied.exit_code, OutOfMemory.exit_code]
    assert "rank 1: error: out of memory: " in result["output"][1]
    assert "lower training.micro_batch_tokens" in result["output"][1]
    assert "lost rank 1" in result["output"][0]


def test_both_ranks_record_the_divergence_at_each_token(results):
    records = lines(results["work"] / "straight 2" / "rollouts" / "step_000000.jsonl")
    assert [len(record["token_divergence"]) for record in records] == [len(r["completion_ids"]) for r in records]
    assert any(value for record in records for value in record["token_divergence"])


def test_full_disk_of_one_rank_stops_all_ranks(results):
    result = results["full_disk"]
    assert BadEnvironment.exit_code in result["codes"]
    assert result["codes"][0] != 0
    assert "cannot write" in "".join(result["output"])
    assert result["checkpoints"] == ["step_000001", "step_000002"]
    assert_same_run(results, "full_disk, resumed", "straight 2")


def test_hanging_reward_is_named(results):
    result = results["hang"]
    assert result["codes"] == [ProcessDied.exit_code, BadData.exit_code]
    assert "faulty in reward.py took more than 4 s on row" in result["output"][1]


@pytest.mark.parametrize(("name", "lost"), [("kill", 1), ("kill the first", 0), ("freeze", 1)])
def test_remaining_ranks_end_and_name_the_lost_one(results, name, lost):
    result = results[name]
    remaining = 1 - lost
    assert result["codes"][lost] == -signal.SIGKILL
    assert result["codes"][remaining] == ProcessDied.exit_code
    assert f"error: lost rank {lost}, which ended or was silent for too long" in result["output"][remaining]
    assert result["seconds"][remaining] < 60
    assert result["status"]["state"] == "failed"
    assert f"lost rank {lost}" in result["status"]["reason"]


@pytest.mark.parametrize(("name", "lost"), [("stuck", 1), ("stuck without the first", 0)])
def test_rank_that_hangs_without_the_lost_one_is_ended(results, name, lost):
    result = results[name]
    remaining = 1 - lost
    assert result["codes"][lost] == -signal.SIGKILL
    assert result["codes"][remaining] == ProcessDied.exit_code
    assert (
        f"rank {remaining}: error: lost rank {lost}, which ended or was silent for 8 s" in result["output"][remaining]
    )
    assert result["status"]["state"] == "failed"
    assert f"lost rank {lost}" in result["status"]["reason"]


def test_finished_run_ends_with_code_0_however_long_engines_take_to_close(results):
    """vLLM destroys the process group, whose store ends with the first rank."""
    ended = results["engine"]
    assert ended["codes"] == [0, 0]
    assert ended["status"]["state"] == "done"
    assert ended["seconds"][1] > ended["seconds"][0] + 3


def test_run_resumes_after_a_rank_was_killed(results):
    assert_same_run(results, "kill, resumed", "straight 2")


def test_resume_reports_a_killed_attempt(results):
    assert results["kill alone"]["codes"] == [-signal.SIGKILL]
    assert results["kill alone"]["status"]["state"] == "running"
    assert "exited without updating its status after step 2" in results["kill alone, resumed"]["output"][0]
    assert "dmesg" in results["kill alone, resumed"]["output"][0]
    assert_same_run(results, "kill alone, resumed", "straight 1")


def test_stop_request_to_one_rank_stops_all_ranks(results):
    result = results["terminate"]
    assert result["codes"] == [Stopped.exit_code] * 2
    assert result["status"]["state"] == "stopped"
    assert result["checkpoints"] == ["step_000002", "step_000003"]
    assert "continue with --resume" in result["output"][0]
    assert "error" not in "".join(result["output"])
    assert_same_run(results, "terminate, resumed", "straight 2")


def test_interrupt_stops_and_a_second_one_aborts(results):
    once, interrupt_twice = results["interrupt alone"], results["interrupt_twice alone"]
    assert once["codes"] == [Stopped.exit_code]
    assert once["checkpoints"] == ["step_000002", "step_000003"]
    assert interrupt_twice["codes"] == [INTERRUPTED]
    assert interrupt_twice["status"]["state"] == "interrupted"
    assert interrupt_twice["checkpoints"] == ["step_000001", "step_000002"]


def test_diverged_run_ends_so_on_every_rank(results):
    result = results["diverged"]
    assert result["codes"] == [Diverged.exit_code] * 2
    assert result["status"]["state"] == "diverged"
    assert "error: the run diverged: steps 2 to 3: the loss is" in result["output"][0]


def test_every_rank_refuses_changed_code_at_once(results):
    result = results["changed code"]
    assert result["codes"] == [UnreadableInput.exit_code] * 2
    assert "reward.py: changed" in result["output"][0]
    assert "reward.py: changed" in result["output"][1]


def test_accepted_code_is_recorded_on_two_ranks(results):
    assert results["accepted code"]["codes"] == [0, 0]
    facts = json.loads((results["work"] / "kill the first" / "provenance.json").read_text())
    (change,) = facts["accepted_changes"]
    assert list(change["code"]) == ["reward.py"]
    first, second = facts["attempts"]
    assert (first["after_step"], first["ranks"]) == (0, 2)
    assert (first["ended"]["state"], first["ended"]["step"]) == ("failed", 2)  # the second rank lost the first
    assert first["ended"]["at"] <= second["started"]
    assert (second["after_step"], second["ranks"]) == (2, 2)
    assert {"host", "cores", "memory_gib", "accelerators"} == set(second["hardware"])
    assert second["argv"][1:] == [
        *second["argv"][1:3],
        "--resume",
        "--changed-code",
        "--to",
        str(results["work"] / "kill the first"),
    ]


def test_loss_that_is_not_finite_ends_a_run_before_its_step(results):
    result, folder = results["not finite"], results["work"] / "not finite"
    assert result["codes"] == [NumericsGuard.exit_code] * 2
    assert result["status"] == result["status"] | {"state": "failed", "step": 1}
    assert "the loss is not finite, in step 2" in result["output"][0]
    assert f"sdkit replay {folder}@1" in result["output"][0].replace("\n", "")
    (bad_batch,) = (folder / "bad_batches").iterdir()
    failed, recorded = lines(bad_batch), lines(folder / "rollouts" / bad_batch.name)
    assert len(recorded) == 4
    assert all(record in recorded for record in failed)


def test_failed_batch_can_be_replayed(results):
    assert results["replayed"]["codes"] == [NumericsGuard.exit_code] * 2
    assert "the loss is not finite, in step 2" in results["replayed"]["output"][0]
    assert results["replayed otherwise"]["codes"] == [0, 0]
    assert results["replayed otherwise"]["status"]["step"] == 2


def test_loss_that_is_not_finite_changes_no_weight(open_tiny):
    trainer = open_tiny()
    advance(trainer, 1)
    before = masters(trainer)
    with torch.no_grad():
        original = trainer.models.student.head[0, 0].item()
        trainer.models.student.head[0, 0] = float("inf")
    with pytest.raises(LossNotFinite):
        advance(trainer, 1)
    with torch.no_grad():
        trainer.models.student.head[0, 0] = original
    assert trainer.progress.optimizer_steps == 1
    for name, value in masters(trainer).items():
        assert_equal(value, before[name])
