"""Weight files: equal to what safetensors writes, complete or absent, and removed if their process is dead."""

import hashlib
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdkit.language.errors import BadEnvironment
from sdkit.serving.weight_files import WeightFolder


class FakeWeights:
    """The part of `Weights` that is written: named tensors, and a model's parameter names."""

    def __init__(self, tensors):
        self.tensors = tensors
        named = [(name.replace(".", ".base_layer."), tensor) for name, tensor in tensors.items()]
        self.causal = SimpleNamespace(named_parameters=lambda: named)

    def named_tensors(self):
        yield from self.tensors.items()


TENSORS = {
    "model.embed.weight": torch.randn(7, 3),
    "model.layers.0.q.weight": torch.randn(4, 6).t(),  # not contiguous
    "model.layers.0.k.weight": torch.randn(5).bfloat16(),
    "model.layers.1.scale": torch.tensor(2.5),
    "lm_head.weight": torch.zeros(0, 3),
}


def test_file_has_the_tensors_bit_for_bit(tmp_path):
    folder = WeightFolder(tmp_path / "weights")
    weight_file = folder.write(FakeWeights(TENSORS), 7, (-1.0, -2.0))
    read = load_file(str(weight_file.path))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    assert (weight_file.version, weight_file.canary) == (7, (-1.0, -2.0))
    assert weight_file.sha256 == hashlib.sha256(weight_file.path.read_bytes()).hexdigest()
    with safe_open(weight_file.path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)


def test_file_names_are_plain_and_unique(tmp_path):
    from sdkit.serving.gateway import FILE, PROBE

    folders = [WeightFolder(tmp_path) for _ in range(2)]
    files = [folder.write(FakeWeights(TENSORS), 0, ()) for folder in folders for _ in range(2)]
    assert len({file.path for file in files}) == 4
    assert all(FILE.fullmatch(file.path.name) for file in files)
    assert all(PROBE.fullmatch(folder.probe) for folder in folders)
    assert all((tmp_path / folder.probe).is_file() for folder in folders)
    assert {oct(file.path.stat().st_mode)[-3:] for file in files} == {"600"}
    for folder in folders:
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_is_absent(tmp_path):
    folder = WeightFolder(tmp_path)

    def fail_after_one_tensor():
        yield "a", torch.ones(3)
        raise OSError(28, "No space left on device")

    weights = FakeWeights({"a": torch.ones(3)})
    weights.named_tensors = fail_after_one_tensor
    with pytest.raises(BadEnvironment, match="No space left on device") as caught:
        folder.write(weights, 1, ())
    assert "rollout.backend.folder" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [folder.probe]


def test_error_for_an_unusable_folder_names_the_key(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadEnvironment, match="cannot use") as caught:
        WeightFolder(tmp_path / "taken" / "weights")
    assert caught.value.path == ("rollout", "backend", "folder")


def test_only_files_of_dead_processes_are_removed(tmp_path):
    dead_process = subprocess.Popen([sys.executable, "-c", ""])
    dead_process.wait()
    host = socket.gethostname()
    dead = [
        f"{host}.{dead_process.pid}.aa.000001.safetensors",
        f".{host}.{dead_process.pid}.aa.000002.safetensors",
        f"{host}.{dead_process.pid}.aa.probe",
    ]
    others = [
        f"{host}.{os.getpid()}.aa.000001.safetensors",
        f"{host}x.{dead_process.pid}.aa.000001.safetensors",
        "model.safetensors",
        f"{host}.notes",
    ]
    for name in (*dead, *others):
        (tmp_path / name).touch()
    folder = WeightFolder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*others, folder.probe}
