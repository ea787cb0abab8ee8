"""Token ids that a model has no embedding for: refused before training, with the row and the token."""

import json
import shutil

import pytest
from attrs import evolve
from tinyruns import inline, make_spec, model, resized, rollout, teacher

from sdkit.language.errors import BadData
from sdkit.language.specs import DatasetSamples, ExternalWeights, Table
from sdkit.models.embedding_ids import KnownIds


@pytest.fixture(scope="module")
def beyond(tiny_folder, tmp_path_factory):
    """The tiny model, and a tokenizer with one token more than it has embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("beyond") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    return folder


def spec_with(folder, column, text="<|pad|>", **changes):
    """The small run; one row's column has the text."""
    data = inline()
    rows = list(data.source.rows)
    rows[3] = Table(dict(rows[3]) | {column: f"see {text}"})
    data = evolve(data, source=evolve(data.source, rows=tuple(rows)))
    return make_spec(folder, data=data, **changes)


NO_WEIGHTS = "sdkit.train.models.load_model"


@pytest.mark.parametrize(
    ("column", "what", "changes"),
    [
        ("prompt", "the student's prompt", {}),
        ("demonstration", "the teacher's prompt", {}),
        ("answer", "the answer", {"rollout": rollout(sampled_by=DatasetSamples(column="answer"))}),
    ],
)
def test_the_row_and_the_token_are_named_before_weights_load(open_tiny, beyond, monkeypatch, column, what, changes):
    monkeypatch.setattr(NO_WEIGHTS, lambda *_: pytest.fail("weights loaded"))
    with pytest.raises(BadData) as caught:
        open_tiny(spec_with(beyond, column, **changes))
    first = caught.value.message.splitlines()[0]
    assert first.startswith(f"row 3: {what} has the token '<|pad|>' with id 404, but ")
    assert first.endswith("has 404 embeddings")
    assert caught.value.path == ("data",)


def test_a_token_that_no_row_uses_is_no_fault(open_tiny, beyond):
    assert open_tiny(make_spec(beyond)).setup.data.largest_id < 404


def test_an_external_teachers_embeddings_count_too(open_tiny, beyond, tiny_folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    large = resized(tiny_folder, tmp_path / "large", 410)
    AutoTokenizer.from_pretrained(beyond).save_pretrained(large)
    monkeypatch.setattr(NO_WEIGHTS, lambda *_: pytest.fail("weights loaded"))
    external = teacher(ExternalWeights(path=str(beyond)))
    with pytest.raises(BadData, match=f"id 404, but {beyond} has 404 embeddings"):
        open_tiny(spec_with(large, "prompt", teacher=external))


def test_where_the_configuration_does_not_say_the_loaded_model_does(open_tiny, beyond, monkeypatch):
    monkeypatch.setattr("sdkit.train.run.known_ids", lambda *_: None)
    with pytest.raises(BadData, match="the student has 404 embeddings") as caught:
        open_tiny(spec_with(beyond, "prompt"))
    assert caught.value.path == ("model", "path")


def test_an_end_token_without_embedding_is_refused(open_tiny, beyond, tmp_path):
    folder = shutil.copytree(beyond, tmp_path / "end")
    settings = folder / "generation_config.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps(written | {"eos_token_id": [1, 404]}))
    with pytest.raises(BadData, match=r"end tokens has the token .* with id 404"):
        open_tiny(make_spec(folder, model=model(folder)))


def test_a_teachers_prompt_that_only_rollouts_complete_is_checked_when_it_is_written(open_tiny, beyond):
    trainer = open_tiny(make_spec(beyond))
    trainer.setup.data.known_ids = KnownIds("a model", 30)
    with pytest.raises(BadData, match="row 0: the teacher's prompt has the token"):
        trainer.setup.data.teacher_prompt(trainer.setup.data.train[0], None)


def test_a_padding_id_that_the_configuration_puts_beyond_the_embedding_is_no_traceback(
    open_tiny, tiny_folder, tmp_path
):
    folder = shutil.copytree(tiny_folder, tmp_path / "pad")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"pad_token_id": 404}))
    with pytest.raises(BadData, match="cannot load") as caught:
        open_tiny(make_spec(folder))
    assert caught.value.path == ("model", "path")
