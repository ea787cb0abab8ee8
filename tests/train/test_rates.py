"""The times, rates and memory of a step are the device's: of its work, not of the calls that launch it."""

import pytest
import torch
from attrs import evolve
from tinyruns import distil, make_spec, rollouts_of, teacher, train_step

from sdkit.language.specs import FrozenWeights, ReferenceKl, StudentWeights, Table, TrustRegionBlend
from sdkit.models.operations import pass_operations
from sdkit.plan.accelerators import ACCELERATORS
from sdkit.train import metrics, report
from sdkit.train.collate import collate
from sdkit.train.step import StepResult
from sdkit.train.stopwatch import Stopwatch


class Stream:
    """A device that has worked until `now`; calls return at once."""

    def __init__(self):
        self.now = 0.0
        self.waited = False

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self, stream):
        assert stream == "cuda:1", "another device's stream knows nothing of this one's work"
        self.at = self.stream.now

    def synchronize(self):
        self.stream.waited = True

    def elapsed_time(self, end):
        assert self.stream.waited, "the device may still be working"
        return (end.at - self.at) * 1000


def test_phases_last_as_long_as_the_work_of_the_device(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    stopwatch = Stopwatch(torch.device("cuda", 1))
    for _ in range(2):
        with stopwatch.phase("teacher"):
            stream.now += 3
        with stopwatch.phase("update"):
            stream.now += 5
    assert stopwatch.seconds() == {"teacher": 6, "update": 10}


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda of an H100 whose tensors took 3 of 4 GiB."""
    values = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "max_memory_allocated": 3 * 2**30,
        "max_memory_reserved": 4 * 2**30,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)


RESULTS = [
    StepResult(metrics={}, seconds={"teacher": 1.0, "update": 3.0}, operations=989e12, tokens=800, applied=True)
] * 2


def test_rates_divide_by_the_seconds_of_scoring_and_update(cuda):
    expected = {"time/trained_tokens_per_second": 200, "time/teraflops": 989 / 4, "time/mfu": 0.25}
    assert metrics._rates(RESULTS, "bfloat16") == pytest.approx(expected)


def test_no_mfu_without_a_known_peak(cuda, monkeypatch):
    assert "time/mfu" not in metrics._rates(RESULTS, "float32")
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_teraflops("bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert metrics.peak_teraflops("bfloat16") == ACCELERATORS["h200"].teraflops
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert metrics._rates(RESULTS, "bfloat16").keys() == {"time/trained_tokens_per_second", "time/teraflops"}


def test_no_rate_of_operations_that_are_not_known():
    unknown = [evolve(RESULTS[0], operations=float("nan"))]
    assert metrics._rates(unknown, "float32").keys() == {"time/trained_tokens_per_second"}
    assert metrics._rates([], "float32") == {}


def test_memory_of_the_device_stands_beside_the_hosts(process_group, cuda):
    peaks = report.memory_peaks()
    assert peaks.pop("memory/peak_gib") > 0
    assert peaks == {"memory/device_allocated_gib": 3, "memory/device_reserved_gib": 4}


BLEND = TrustRegionBlend(student_share=0.5)


@pytest.mark.parametrize(
    ("changes", "student_passes", "teacher_passes"),
    [
        ({}, 3, 1),
        ({"teacher": evolve(teacher(FrozenWeights()), blend=BLEND)}, 3, 2),
        ({"teacher": evolve(teacher(FrozenWeights()), blend=TrustRegionBlend(student_share=1.0))}, 3, 1),
        ({"losses": Table(dict(distil()) | {"stay": ReferenceKl(coefficient=0.1, estimator="vocabulary")})}, 4, 1),
        ({"teacher": teacher(StudentWeights())}, 3, 1),
    ],
    ids=["teacher", "blend", "partner alone", "reference", "live"],
)
def test_a_step_counts_the_passes_that_it_makes(open_tiny, tiny_folder, changes, student_passes, teacher_passes):
    trainer = open_tiny(make_spec(tiny_folder, **changes))
    batch = rollouts_of(trainer)
    result = train_step(trainer, batch)
    student, device = trainer.models.student, trainer.models.device
    (micro,) = collate(list(batch), trainer.specs.losses, 10**6, lambda x: x, device).micro_batches
    expected = student_passes * pass_operations(student, micro.student.texts)
    expected += teacher_passes * pass_operations(student, micro.teacher.texts)
    assert result.operations == pytest.approx(expected)
    assert result.tokens == sum(len(r.completion_ids) for r in batch)
