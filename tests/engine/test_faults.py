"""Requests to stop wherever they come, and numbers that are not finite: what a run leaves and how it ends."""

import json
import os
import signal
import time

import pytest
import torch
from tinyruns import (
    evaluated,
    inline,
    lines,
    make_spec,
    metrics,
    rollout,
    same,
    teacher,
    train,
    training,
    weights_of,
)

from sdkit.components.rollouts import TransformersRollouts
from sdkit.engine import loop, stopping
from sdkit.engine.step import _spoiling
from sdkit.problems import NumericsGuard, Stopped
from sdkit.specs import EmaWeights, OptimizerSpec, Suite, Table


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
    "rollout": (loop, "gather", 1, 1),
    "update": (loop, "train_step", 1, 1),
}


REQUESTS = [*((where, signal.SIGTERM) for where in ASKED), ("rollout", signal.SIGINT)]


@pytest.mark.parametrize(("where", "number"), REQUESTS)
def test_a_request_is_heeded_wherever_it_comes(
    spec, straight, tmp_path, monkeypatch, where, number
):
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

    at_call(monkeypatch, TransformersRollouts, "sample", 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == "interrupted"


def test_a_request_while_the_model_is_written_changes_nothing(spec, tmp_path, monkeypatch):
    from sdkit.engine import checkpoint

    at_call(monkeypatch, checkpoint, "save_model", 1, lambda: send(signal.SIGTERM))
    assert status(train(spec, tmp_path / "run"))["state"] == "done"


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.requests() as stop:
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


# ── numbers that are not finite ───────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_spoils_its_gradient():
    """x + inf has the gradient 1, so the norm alone would let the step pass."""
    for constant, gradient in (
        (2.0, 1.0),
        (float("inf"), float("nan")),
        (float("nan"), float("nan")),
    ):
        x = torch.tensor(3.0, requires_grad=True)
        _spoiling(x + constant).backward()
        torch.testing.assert_close(x.grad, torch.tensor(gradient), equal_nan=True, atol=0, rtol=0)
    kept = torch.tensor(1 / 3)
    same(_spoiling(kept), kept)


def test_the_batch_that_ended_a_run_is_kept(tiny_folder, tmp_path):
    spec = make_spec(
        tiny_folder,
        optimizer=OptimizerSpec(lr=1e30, clip=1e30),
        training=training(steps=9, updates_per_rollout=2),
    )
    folder = tmp_path / "run"
    with pytest.raises(NumericsGuard, match="3 optimizer steps in a row") as caught:
        train(spec, folder)
    assert caught.value.exit_code == 8
    assert status(folder)["state"] == "failed"
    (kept,) = (folder / "bad_batches").iterdir()
    assert str(kept) in caught.value.message
    failed, whole = lines(kept), lines(folder / "rollouts" / kept.name)
    # Four prompts, two updates: the failed one had two of them.
    assert [len(failed), len(whole)] == [2, 4]
    assert all(record in whole for record in failed)
