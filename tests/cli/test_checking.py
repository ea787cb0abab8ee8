"""Checks of a run's resolved spec: warnings are about what the user overrides, not about defaults spelled out there."""

import json

import pytest
from typer.testing import CliRunner

from sdkit.cli import app, main, writing
from sdkit.cli.checking import check_run
from sdkit.language.errors import UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.show import annotated

RUN_FILE = """
method: sft
model: {path: bundled:smollm2-135m-instruct}
data:
  source: {kind: inline, rows: [{q: one, d: two}]}
  columns: {prompt: q, demonstration: d}
optimizer: {lr: 1e-5}
training: {steps: 2, prompts_per_step: 1}
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    checked = load_spec(tmp_path / "run.yaml")
    assert not checked.problems
    (tmp_path / "resolved.yaml").write_text(annotated(checked))
    (tmp_path / "provenance.json").write_text(json.dumps({"base": str(tmp_path)}))
    return tmp_path


def test_resolved_defaults_give_no_warning(run, capsys):
    assert load_spec(run / "resolved.yaml", ["optimizer.lr=2e-5"]).problems  # a default that has no effect here
    for overrides in [(), ("optimizer.lr=2e-5",)]:
        check_run(run, overrides)
        assert capsys.readouterr().err == ""


def test_overrides_give_their_own_warnings(run, capsys):
    check_run(run, ["output.keep_checkpoints=3"])
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert "keep_checkpoints has no effect without checkpoint_every" in line
    check_run(run, ["optimizer.lr=2e-5"], fixed=["output.keep_checkpoints=3"])
    assert "keep_checkpoints" not in capsys.readouterr().err


def test_override_with_dashes_is_refused_with_its_spelling(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sdkit", "plan", "sdft", "--training.steps=3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: --training.steps=3 is no option: overrides have no dashes\n  = write training.steps=3\n"
    )


@pytest.mark.parametrize("command", ["train", "serve"])
def test_commands_that_need_a_run_file_promise_no_method_page(command):
    shown = CliRunner().invoke(app, [command, "--help"]).output
    assert "A run file." in shown
    assert "method page" not in shown


@pytest.mark.parametrize("word", ["optimizer.lr", "training.steps:3", "~evaluation", "+rewards"])
def test_an_override_without_a_value_is_not_taken_for_a_file(tmp_path, monkeypatch, capsys, word):
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    monkeypatch.setattr("sys.argv", ["sdkit", "validate", str(path), word])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert f"{word} is neither a file nor an override of the form key.path=value" in capsys.readouterr().err


def test_a_run_file_is_not_written_to_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UnreadableInput, match=r"there is no folder .*none to write run.yaml to"):
        writing._write_new(tmp_path / "none" / "run.yaml", "")
