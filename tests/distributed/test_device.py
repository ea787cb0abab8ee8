"""The device of a rank, on a machine whose GPUs are simulated: its index is explicit and never another rank's."""

import os
import re
from pathlib import Path

import pytest
import torch

import sdkit
from sdkit.language.errors import BadEnvironment
from sdkit.models.device import rank_device

PACKAGE = Path(sdkit.__file__).parent


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch report two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_every_rank_has_its_own_gpu(gpus, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert rank_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device() == torch.device("cuda", 1)


def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadEnvironment, match="torch finds 2") as caught:
        rank_device()
    assert "at most 2 processes" in caught.value.hint


def test_without_gpus_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert rank_device() == torch.device("cpu")


def test_no_code_names_a_gpu_without_its_index():
    """Such a device is the current one of the process, which another library may have changed."""
    unindexed = re.compile(r"""device\(\s*["']cuda["']\s*(\)|if)|\.cuda\(\)|\.to\(["']cuda["']""")
    for path in PACKAGE.rglob("*.py"):
        assert not unindexed.search(path.read_text(encoding="utf-8")), os.path.relpath(path, PACKAGE)
