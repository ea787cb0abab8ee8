"""What the end of a run writes is tried before its first step, and a checkpoint's own settings are written as they were."""

import json
from shutil import copytree

import pytest
from attrs import evolve
from tinyruns import LORA, evaluated, make_spec, model, train, training
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
def test_settings_that_the_library_refuses_to_write_are_written_as_they_were(tiny_folder, tmp_path, name):
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig(**INVALID[name]).save_pretrained(tmp_path / "refused")
    folder = with_settings(tiny_folder, tmp_path / "model", INVALID[name])
    spec = make_spec(folder, training=training(steps=1))
    if name == "sampling":
        output = OutputSpec(checkpoint_every=1, keep_best="score", tensorboard=False)
        spec = evolve(evaluated(spec), output=output)
    run = train(spec, tmp_path / "run")
    written = [run / "model", *([run / "best" / "model"] if name == "sampling" else [])]
    export(spec, tmp_path, run, tmp_path / "exported", merge=False)
    for each in [*written, tmp_path / "exported"]:
        found = json.loads((each / "generation_config.json").read_text())
        assert INVALID[name].items() <= found.items()
        AutoModelForCausalLM.from_pretrained(each)


@pytest.fixture
def refuse(monkeypatch):
    """Let the library refuse to save a tokenizer, a configuration or an adapter's; with a reason of several lines."""

    def now(owner):
        def save_pretrained(*_, **__):
            raise ValueError("the settings are invalid: \n- `temperature`: too hot\n- `top_p`: low")

        monkeypatch.setattr(owner, "save_pretrained", save_pretrained)

    return now


@pytest.mark.parametrize("what", ["tokenizer", "configuration", "adapter"])
def test_what_cannot_be_saved_ends_a_run_before_its_first_step(tiny_folder, tmp_path, refuse, what):
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    owners = {"tokenizer": PreTrainedTokenizerBase, "configuration": PreTrainedConfig}
    refuse(owners.get(what, PeftConfig))
    spec = make_spec(tiny_folder, model=model(tiny_folder, lora=LORA if what == "adapter" else None))
    with pytest.raises(BadData, match="could not be saved") as caught:
        train(spec, tmp_path / "run")
    assert caught.value.message.endswith("`temperature`: too hot - `top_p`: low")
    assert caught.value.path == ("model", "path")
    assert not (tmp_path / "run" / "rollouts").exists()
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (state["state"], state["step"]) == ("failed", 0)


def test_a_full_disk_is_said_as_one(tiny_folder, open_tiny, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer.setup.data.tokenizer), "save_pretrained", full)
    with pytest.raises(BadEnvironment, match="no space left on device"):
        checkpoint.check_saving(trainer.models.student, trainer.setup.data.tokenizer)


def test_nothing_remains_of_the_attempt(tiny_folder, open_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer = open_tiny(make_spec(tiny_folder))
    checkpoint.check_saving(trainer.models.student, trainer.setup.data.tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_error_nobody_expected_is_told_in_full(tmp_path):
    (tmp_path / "run").mkdir()
    run = directory.RunDirectory(tmp_path / "run", tensorboard=False)
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
def test_a_first_line_is_followed_by_what_it_announces(text, line):
    assert first_line(ValueError(text)) == line
