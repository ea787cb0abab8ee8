"""Errors for model folders that cannot be used."""

import json
import shutil

import pytest
from attrs import evolve
from families import build
from tinyruns import make_spec

from sdkit.language.errors import BadData
from sdkit.language.files import library_reads
from sdkit.models.loading import load_config, load_model, load_tokenizer

UNREADABLE = "no tokenizer in |cannot load "
DEEP = '{"a": ' + 100_000 * "["
DAMAGED = {
    ("config.json", "deep"): DEEP,
    ("config.json", "a list"): "[1, 2]",
    ("config.json", "text for a number"): {"hidden_size": "x"},
    ("config.json", "no heads"): {"num_attention_heads": 0},
    ("config.json", "a list for a name"): {"model_type": [1]},
    ("tokenizer.json", "deep"): DEEP,
    ("tokenizer.json", "a list"): "[1]",
    ("tokenizer_config.json", "a list"): "[1]",
    ("generation_config.json", "deep"): DEEP,
    ("generation_config.json", "a list"): "[1]",
    ("model.safetensors", "no header"): "[1]",
}


@pytest.mark.parametrize(("file", "damage"), DAMAGED)
def test_damaged_model_file_is_reported(tiny_folder, tmp_path, file, damage):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content = DAMAGED[file, damage]
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).write_text(content)
    message = f"^{folder}/config.json cannot be read: " if file == "config.json" else UNREADABLE
    with pytest.raises(BadData, match=message):
        open_all(make_spec(folder).model, str(folder))
    if file == "config.json":
        with pytest.raises(BadData, match=message):
            load_config(make_spec(folder).model, str(folder))


def open_all(spec, folder):
    load_tokenizer(spec, folder)
    load_config(spec, folder)
    load_model(spec, folder, seed=0)


def test_errors_outside_a_file_are_passed_on():
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (MemoryError(), OutOfMemoryError(), BadData("as it is")):
        with pytest.raises(type(error)) as caught, library_reads("cannot load it"):
            raise error
        assert caught.value is error


def test_model_without_the_attention_kernel_gets_a_hint(tmp_path):
    spec = make_spec(build(tmp_path / "bloom", "bloom")).model
    with pytest.raises(BadData, match="the model has no sdpa attention") as caught:
        load_model(spec, str(tmp_path / "bloom"), seed=0)
    assert caught.value.path == ("model", "attn_implementation")
    assert caught.value.hint == "set model.attn_implementation: eager"


def test_missing_flash_attention_gets_a_hint(tiny_folder):
    spec = evolve(make_spec(tiny_folder).model, attn_implementation="flash_attention_2", dtype="bfloat16")
    with pytest.raises(BadData, match="flash_attention_2 does not run here") as caught:
        load_model(spec, str(tiny_folder), seed=0)
    assert caught.value.path == ("model", "attn_implementation")
    assert caught.value.hint == "install flash-attn, or set model.attn_implementation: sdpa"
