"""Weight files: what safetensors itself writes, whole or not there, and none left by processes that are gone."""

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


class Held:
    """As much of `Weights` as is written: named tensors, under the names of a model's parameters."""

    def __init__(self, tensors):
        self.held = tensors
        named = [(name.replace(".", ".base_layer."), tensor) for name, tensor in tensors.items()]
        self.causal = SimpleNamespace(named_parameters=lambda: named)

    def named_tensors(self):
        yield from self.held.items()


TENSORS = {
    "model.embed.weight": torch.randn(7, 3),
    "model.layers.0.q.weight": torch.randn(4, 6).t(),  # not contiguous
    "model.layers.0.k.weight": torch.randn(5).bfloat16(),
    "model.layers.1.scale": torch.tensor(2.5),
    "lm_head.weight": torch.zeros(0, 3),
}


def test_a_file_holds_the_tensors_bit_for_bit(tmp_path):
    folder = WeightFolder(tmp_path / "weights")
    found = folder.write(Held(TENSORS), 7, (-1.0, -2.0))
    read = load_file(str(found.path))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    assert (found.version, found.canary) == (7, (-1.0, -2.0))
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    with safe_open(found.path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)


def test_a_files_name_is_plain_and_its_own(tmp_path):
    from sdkit.serving.gateway import FILE, PROBE

    folders = [WeightFolder(tmp_path) for _ in range(2)]
    files = [folder.write(Held(TENSORS), 0, ()) for folder in folders for _ in range(2)]
    assert len({file.path for file in files}) == 4
    assert all(FILE.fullmatch(file.path.name) for file in files)
    assert all(PROBE.fullmatch(folder.probe) for folder in folders)
    assert all((tmp_path / folder.probe).is_file() for folder in folders)
    assert {oct(file.path.stat().st_mode)[-3:] for file in files} == {"600"}
    for folder in folders:
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_not_there(tmp_path):
    folder = WeightFolder(tmp_path)

    def broken():
        yield "a", torch.ones(3)
        raise OSError(28, "No space left on device")

    held = Held({"a": torch.ones(3)})
    held.named_tensors = broken
    with pytest.raises(BadEnvironment, match="No space left on device") as caught:
        folder.write(held, 1, ())
    assert "rollout.backend.folder" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [folder.probe]


def test_a_folder_that_cannot_be_made_blames_its_key(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadEnvironment, match="cannot use") as caught:
        WeightFolder(tmp_path / "taken" / "weights")
    assert caught.value.path == ("rollout", "backend", "folder")


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = [
        f"{host}.{gone.pid}.aa.000001.safetensors",
        f".{host}.{gone.pid}.aa.000002.safetensors",
        f"{host}.{gone.pid}.aa.probe",
    ]
    kept = [
        f"{host}.{os.getpid()}.aa.000001.safetensors",
        f"{host}x.{gone.pid}.aa.000001.safetensors",
        "model.safetensors",
        f"{host}.notes",
    ]
    for name in (*dead, *kept):
        (tmp_path / name).touch()
    folder = WeightFolder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*kept, folder.probe}
