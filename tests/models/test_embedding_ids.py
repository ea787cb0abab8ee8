"""Token ids that a model has no embedding for: refused before training, with the row and the token."""

import json
import shutil

import pytest
from attrs import evolve
from tinyruns import inline, make_spec, model, resize_model, rollout, teacher

from sdkit.language.errors import BadData
from sdkit.language.specs import DatasetSamples, ExternalWeights, Table
from sdkit.models.embedding_ids import KnownIds


@pytest.fixture(scope="module")
def folder_without_pad_embedding(tiny_folder, tmp_path_factory):
    """The tiny model, with a tokenizer that has one token more than the model has embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("beyond") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    return folder


def spec_with(folder, column, text="<|pad|>", **changes):
    """The small run, with `text` in one row's column."""
    data = inline()
    rows = list(data.source.rows)
    rows[3] = Table(dict(rows[3]) | {column: f"see {text}"})
    data = evolve(data, source=evolve(data.source, rows=tuple(rows)))
    return make_spec(folder, data=data, **changes)


NO_WEIGHTS = "sdkit.train.models.load_model"


@pytest.mark.parametrize(
    ("column", "role", "changes"),
    [
        ("prompt", "the student's prompt", {}),
        ("demonstration", "the teacher's prompt", {}),
        ("answer", "the answer", {"rollout": rollout(sampled_by=DatasetSamples(column="answer"))}),
    ],
)
def test_row_and_token_are_named_before_weights_load(
    open_tiny, folder_without_pad_embedding, monkeypatch, column, role, changes
):
    monkeypatch.setattr(NO_WEIGHTS, lambda *_: pytest.fail("weights loaded"))
    with pytest.raises(BadData) as caught:
        open_tiny(spec_with(folder_without_pad_embedding, column, **changes))
    first = caught.value.message.splitlines()[0]
    assert first.startswith(f"row 3: {role} has the token '<|pad|>' with id 404, but ")
    assert first.endswith("has 404 embeddings")
    assert caught.value.path == ("data",)


def test_token_that_no_row_uses_is_accepted(open_tiny, folder_without_pad_embedding):
    assert open_tiny(make_spec(folder_without_pad_embedding)).setup.data.largest_id < 404


def test_embeddings_of_an_external_teacher_are_checked(
    open_tiny, folder_without_pad_embedding, tiny_folder, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    large = resize_model(tiny_folder, tmp_path / "large", 410)
    AutoTokenizer.from_pretrained(folder_without_pad_embedding).save_pretrained(large)
    monkeypatch.setattr(NO_WEIGHTS, lambda *_: pytest.fail("weights loaded"))
    external = teacher(ExternalWeights(path=str(folder_without_pad_embedding)))
    with pytest.raises(BadData, match=f"id 404, but {folder_without_pad_embedding} has 404 embeddings"):
        open_tiny(spec_with(large, "prompt", teacher=external))


def test_loaded_model_is_checked_if_the_config_has_no_size(open_tiny, folder_without_pad_embedding, monkeypatch):
    monkeypatch.setattr("sdkit.train.run.known_ids", lambda *_: None)
    with pytest.raises(BadData, match="the student has 404 embeddings") as caught:
        open_tiny(spec_with(folder_without_pad_embedding, "prompt"))
    assert caught.value.path == ("model", "path")


def test_end_token_without_embedding_is_refused(open_tiny, folder_without_pad_embedding, tmp_path):
    folder = shutil.copytree(folder_without_pad_embedding, tmp_path / "end")
    settings = folder / "generation_config.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps(written | {"eos_token_id": [1, 404]}))
    with pytest.raises(BadData, match=r"end tokens has the token .* with id 404"):
        open_tiny(make_spec(folder, model=model(folder)))


def test_teacher_prompt_built_from_rollouts_is_checked(open_tiny, folder_without_pad_embedding):
    trainer = open_tiny(make_spec(folder_without_pad_embedding))
    trainer.setup.data.known_ids = KnownIds("a model", 30)
    with pytest.raises(BadData, match="row 0: the teacher's prompt has the token"):
        trainer.setup.data.teacher_prompt(trainer.setup.data.train[0], None)


def test_padding_id_beyond_the_embeddings_is_reported(open_tiny, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "pad")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"pad_token_id": 404}))
    with pytest.raises(BadData, match="cannot load") as caught:
        open_tiny(make_spec(folder))
    assert caught.value.path == ("model", "path")
