"""The memory of training and of vLLM's engine, summed before the engine starts; the GPU is simulated."""

import pytest
import torch
from attrs import evolve
from tinyruns import advance, make_spec, train, training

from sdkit.language.errors import OutOfMemory
from sdkit.language.specs import VllmBackend
from sdkit.train import engine_memory
from sdkit.train.engine_memory import GIB, GpuMemory, check_engine_fits, shortage

HALF = VllmBackend(gpu_memory_utilization=0.5)


def memory(resident, training, usable=80.0):
    return GpuMemory(total=80.0, usable=usable, resident=resident, training=training)


@pytest.mark.parametrize(("training", "fits"), [(40.0, True), (41.0, False)])
def test_training_and_engine_are_added(training, fits):
    assert (shortage(HALF, memory(20.0, training)) is None) == fits


def test_memory_of_other_processes_is_not_usable():
    assert shortage(HALF, memory(20.0, 35.0)) is None
    assert shortage(HALF, memory(20.0, 35.0, usable=70.0)) is not None


@pytest.mark.parametrize(
    ("resident", "training", "fits"), [(40.0, 80.0, True), (41.0, 60.0, False), (10.0, 81.0, False)]
)
def test_engine_that_sleeps_shares_only_what_stays_between_steps(resident, training, fits):
    sleeping = evolve(HALF, enable_sleep_mode=True)
    assert (shortage(sleeping, memory(resident, training)) is None) == fits


def test_message_has_the_sums_and_what_to_set():
    message, hint = shortage(HALF, memory(20.0, 50.0))
    assert message == "training needs 50.0 GiB of the GPU's 80.0, vLLM 40.0, and 80.0 are usable"
    assert hint == "set rollout.backend.gpu_memory_utilization to 0.37, or set rollout.backend.enable_sleep_mode: true"
    assert "micro_batch_tokens" in shortage(HALF, memory(20.0, 90.0))[1]


def test_moments_are_counted_until_they_exist(open_tiny):
    trainer = open_tiny(training=training(zero_stage=1))
    zero, device = trainer.learner.zero, torch.device("cpu")
    trained = sum(p.numel() for _, p in zero.named)
    assert zero.moments_to_come(device) == pytest.approx(8 * trained, rel=1e-3)  # DeepSpeed pads the shard
    advance(trainer, 1)
    assert zero.moments_to_come(device) == 0


@pytest.fixture
def small_gpu(monkeypatch):
    """Simulates a GPU of 0.01 GiB that only the trainer uses."""
    monkeypatch.setattr(engine_memory, "rank_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(0.006 * GIB), int(0.01 * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: int(0.003 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(0.004 * GIB))


def test_check_adds_the_memory_that_the_plan_expects(open_tiny, small_gpu):
    trainer = open_tiny()
    zero, setup = trainer.learner.zero, trainer.setup
    check_engine_fits(setup, zero)  # no engine in this process
    engine = evolve(setup, plan=evolve(setup.plan, evaluation_backend=VllmBackend()))
    expected = engine_memory._planned_gib(setup)
    assert expected > 0.003
    with pytest.raises(OutOfMemory, match=f"training needs {expected:.1f} GiB") as caught:
        check_engine_fits(engine, zero)
    assert caught.value.path == ("rollout", "backend")


def test_run_checks_before_the_engine_starts(tiny_folder, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr("sdkit.train.run.check_engine_fits", lambda *_: events.append("check"))
    start = "sdkit.train.rollout_sampler.RolloutSampler.start_engines"
    monkeypatch.setattr(start, lambda _: events.append("start"))
    train(make_spec(tiny_folder, training=training(steps=1)), tmp_path / "run")
    assert events == ["check", "start"]
