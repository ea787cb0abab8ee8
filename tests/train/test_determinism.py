"""`training.deterministic`: on while a batch is scored and trained on, off while it is sampled; no other numbers on a CPU."""

import os

import torch
from tinyruns import make_spec, metrics, train, training, weights_of

from sdkit.sampling.transformers import TransformersRollouts
from sdkit.train import determinism, step


def test_updates_use_deterministic_kernels_and_sampling_any(tiny_folder, tmp_path, monkeypatch):
    for name in determinism.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    states = {"sample": [], "update": []}

    def record(what, function):
        def recorded(*arguments):
            states[what].append(torch.are_deterministic_algorithms_enabled())
            return function(*arguments)

        return recorded

    monkeypatch.setattr(TransformersRollouts, "_generate", record("sample", TransformersRollouts._generate))
    monkeypatch.setattr(step, "_collate", record("update", step._collate))
    folders = []
    for deterministic in (False, True):
        spec = make_spec(tiny_folder, training=training(steps=2, deterministic=deterministic))
        folders.append(train(spec, tmp_path / str(deterministic)))
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
        assert set(states["sample"]) == {False}
        assert states["update"] == [deterministic] * 2
        states["update"].clear()
    assert not torch.are_deterministic_algorithms_enabled()
    assert metrics(folders[0]) == metrics(folders[1])
    plain, same = map(weights_of, folders)
    assert all(torch.equal(plain[name], value) for name, value in same.items())


def test_own_environment_variables_stay(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    determinism.prepare(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ.pop("FLASH_ATTENTION_DETERMINISTIC") == "1"
