"""Saving is tried before the first step, and a model's own generation settings are saved unchanged."""

import json
from shutil import copytree

import pytest
from attrs import evolve
from tinyruns import LORA, make_spec, model, train, training, with_evaluation
from transformers import AutoModelForCausalLM, GenerationConfig

from sdkit.checkpoints import checkpoint
from sdkit.language.errors import BadData, BadEnvironment, first_line, one_line
from sdkit.language.specs import OutputSpec
from sdkit.runs import directory
from sdkit.runs.export import export
from sdkit.train import failures

INVALID = {
    "sampling": {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "outputs": {"output_scores": True},
    "padding": {"pad_token_id": -1},
}


def with_settings(source, target, settings):
    copytree(source, target)
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("name", INVALID)
def test_settings_that_transformers_refuses_to_save_are_saved_unchanged(tiny_folder, tmp_path, name):
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig(**INVALID[name]).save_pretrained(tmp_path / "refused")
    folder = with_settings(tiny_folder, tmp_path / "model", INVALID[name])
    spec = make_spec(folder, training=training(steps=1))
    if name == "sampling":
        output = OutputSpec(checkpoint_every=1, keep_best="score", trackers=())
        spec = evolve(with_evaluation(spec), output=output)
    run = train(spec, tmp_path / "run")
    written = [run / "model", *([run / "best" / "model"] if name == "sampling" else [])]
    export(spec, tmp_path, run, tmp_path / "exported", merge=False)
    for saved in [*written, tmp_path / "exported"]:
        settings = json.loads((saved / "generation_config.json").read_text())
        assert INVALID[name].items() <= settings.items()
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.fixture
def refuse(monkeypatch):
    """Makes a class refuse to save, with a reason of several lines."""

    def refuse_for(owner):
        def save_pretrained(*_, **__):
            raise ValueError("the settings are invalid: \n- `temperature`: too hot\n- `top_p`: low")

        monkeypatch.setattr(owner, "save_pretrained", save_pretrained)

    return refuse_for


@pytest.mark.parametrize("part", ["tokenizer", "configuration", "adapter"])
def test_run_that_cannot_be_saved_ends_before_its_first_step(tiny_folder, tmp_path, refuse, part):
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    owners = {"tokenizer": PreTrainedTokenizerBase, "configuration": PreTrainedConfig}
    refuse(owners.get(part, PeftConfig))
    spec = make_spec(tiny_folder, model=model(tiny_folder, lora=LORA if part == "adapter" else None))
    with pytest.raises(BadData, match="could not be saved") as caught:
        train(spec, tmp_path / "run")
    assert caught.value.message.endswith("`temperature`: too hot - `top_p`: low")
    assert caught.value.path == ("model", "path")
    assert not (tmp_path / "run" / "rollouts").exists()
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (state["state"], state["step"]) == ("failed", 0)


def test_full_disk_is_reported_as_such(tiny_folder, open_tiny, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer.setup.data.tokenizer), "save_pretrained", full)
    with pytest.raises(BadEnvironment, match="no space left on device"):
        checkpoint.check_saving(trainer.models.student, trainer.setup.data.tokenizer)


def test_check_of_saving_leaves_no_file(tiny_folder, open_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer = open_tiny(make_spec(tiny_folder))
    checkpoint.check_saving(trainer.models.student, trainer.setup.data.tokenizer)
    assert not list(tmp_path.iterdir())


def test_unexpected_error_is_reported_in_full(tmp_path):
    (tmp_path / "run").mkdir()
    run = directory.RunDirectory(tmp_path / "run")
    error = ValueError("it is invalid: \n- this\n\n- and that")
    assert "ValueError: it is invalid: - this - and that" in str(failures.reported_error(error, run))
    cut = one_line(ValueError("a " * 900))
    assert len(cut) == 600
    assert cut.endswith("…")
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo", "one"),
        ("invalid: \n- `a`: b\n- c", "invalid: - `a`: b"),
        ("why:\n\nbecause:\nso\nno", "why: because: so"),
        ("", "ValueError"),
    ],
)
def test_first_line_includes_the_list_it_announces(text, line):
    assert first_line(ValueError(text)) == line
