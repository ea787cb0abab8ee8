"""A user's mistakes are reported before training, with file, line, column and the exit code of their kind."""

import json
import shutil
import sys

import pytest

from sdkit.cli import main

RUN = """\
model: {path: MODEL, dtype: float32}
data:
  source: {kind: inline, rows: [{q: 1 + 1, d: "1 + 1 = 2"}, {q: 2 + 2, d: "2 + 2 = 4"}]}
  columns: {prompt: q, demonstration: d}
rollout: {max_new_tokens: 4, backend: transformers, completions_per_prompt: 2}
teacher:
  weights: frozen
  sees: {template: "{prompt} ({demonstration})", slots: {demonstration: {kind: column, name: demonstration}}}
losses:
  distil: {kind: distillation, divergence: forward_kl, support: vocabulary}
optimizer: {lr: 1.0e-3}
training: {steps: 1, prompts_per_step: 2}
output: {trackers: []}
rewards: {r: {kind: regex, pattern: x}}
"""
MINE = """\
import time
def fails(completion, row):
    return row["gold"]
def none(completion, row):
    return None
def slow(completion, row):
    time.sleep(30)
def mixes(student, teacher):
    return (student - teacher).sum(-1).mean().expand(student.shape[:-1])
def negative(counts):
    return counts * -1.0
"""
POLICY = (
    "  distil: {kind: distillation, divergence: forward_kl, support: vocabulary}",
    "  distil: {kind: distillation, divergence: forward_kl, support: vocabulary}\n"
    "  pull: {kind: policy_gradient, advantage: group_relative}",
)
REWARD = "rewards: {r: {kind: regex, pattern: x}}"


@pytest.fixture
def sdkit(monkeypatch, capsys, tmp_path, tiny_folder):
    """Runs a command on the run file with these texts replaced, in its folder; returns exit code and standard error."""

    def run(command, *replaced):
        monkeypatch.chdir(tmp_path)
        text = RUN
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "run.yaml").write_text(text.replace("MODEL", str(tiny_folder)))
        (tmp_path / "mine.py").write_text(MINE)
        monkeypatch.setattr(sys, "argv", ["sdkit", command, "run.yaml"])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        return code, capsys.readouterr().err

    return run


WRONG = {
    "unknown slot": (
        ("({demonstration})", "({demo})"),
        "run.yaml:8:20: {demo} is not one of 'prompt', 'demonstration' [unknown_slot]",
    ),
    "missing slot": (
        (" ({demonstration})", ""),
        "run.yaml:8:40: slot 'demonstration' is in no template [unused_slot]",
    ),
    "missing prompt": (
        ("{prompt} (", "("),
        "run.yaml:8:20: the template takes the user's place, but has no {prompt} [prompt_missing]",
    ),
    "braces in the text": (
        ('"{prompt} (', '"{prompt} {} ('),
        "run.yaml:8:20: {} is not a slot's name in braces",
    ),
    "an open brace": (("n})", "n)"), "run.yaml:8:20: "),
    "a group of one": (
        (", completions_per_prompt: 2", ""),
        "run.yaml:11:33: completions_per_prompt is 1 by default, so every advantage of the reward is 0",
    ),
    "k above the vocabulary": (
        ("support: vocabulary", "support: {kind: top_k, k: 9999, chosen_by: teacher, remainder: drop}"),
        "run.yaml:10:82: k is 9999, but the vocabulary has 404 tokens [support_size]",
    ),
    "k3": (
        ("divergence: forward_kl", "divergence: k3"),
        "differentiated, k1 teaches nothing and k3 pulls by the forward KL",
    ),
    "no such model": (("path: MODEL", "path: ./gone"), "run.yaml:1:15: there is no folder ./gone"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_validate_reports_what_the_file_shows(sdkit, case):
    replaced, message = WRONG[case]
    code, err = sdkit("validate", POLICY, replaced)
    assert code == 1
    assert message in err


FAILING = {
    "a reward that fails": (
        (REWARD, "rewards: {r: {kind: file, file: mine.py, function: fails}}"),
        "error: mine.py:3:1: fails failed on row ",
        "  = asked for at run.yaml:15:11",
    ),
    "a reward that is no number": (
        (REWARD, "rewards: {r: {kind: file, file: mine.py, function: none}}"),
        "error: run.yaml:15:11: none in mine.py returned None for row ",
        "",
    ),
    "a reward that is late": (
        (REWARD, "rewards: {r: {kind: file, file: mine.py, function: slow, seconds: 0.1}}"),
        "error: run.yaml:15:11: slow in mine.py took more than 0.1 s on row ",
        "make it quicker",
    ),
    "a right answer that is none": (
        (REWARD, "rewards: {r: {kind: number, answer: demonstration}}"),
        "error: run.yaml:15:11: row ",
        "in the column 'demonstration' is not a number",
    ),
    "a divergence that mixes positions": (
        ("divergence: forward_kl", "divergence: {file: mine.py, function: mixes}"),
        "error: run.yaml:10:32: mixes in mine.py mixes positions",
        "",
    ),
    "a weight below 0": (
        ("support: vocabulary", "support: vocabulary, weight: {file: mine.py, function: negative}"),
        "error: run.yaml:10:77: negative in mine.py returned -1",
        "",
    ),
    "a template that leaves no room": (
        ("slots: {dem", "max_prompt_tokens: 2, slots: {dem"),
        "error: run.yaml:8:3: row ",
        "raise teacher.sees.max_prompt_tokens",
    ),
    "layers that no adapter fits": (
        ("dtype: float32}", "dtype: float32, lora: {r: 2, lora_alpha: 4, target_modules: [nope]}}"),
        "target_modules: ",
        "nope",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_mistakes_that_only_a_run_can_see_end_it_before_training(sdkit, tmp_path, case):
    replaced, message, hint = FAILING[case]
    code, err = sdkit("train", POLICY, replaced)
    assert code == 3
    assert message in err
    assert hint in err
    assert "run.yaml:" in err
    assert not (tmp_path / "runs").exists()


def test_k_above_the_vocabulary_is_refused_if_the_folder_has_no_size(sdkit, tmp_path, tiny_folder):
    """The loaded model knows the size that the folder lacks."""
    folder = tmp_path / "unsized"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    top = "support: {kind: top_k, k: 9999, chosen_by: teacher, remainder: drop}"
    code, err = sdkit("train", ("MODEL", "unsized"), ("support: vocabulary", top))
    assert (code, err) == (
        3,
        "error: run.yaml:10:82: k is 9999, but the vocabulary has 404 tokens\n  = use support: vocabulary\n",
    )


def test_teacher_with_another_vocabulary_is_refused(sdkit, tmp_path, tiny_folder):
    """Without this file, the tokenizers are compared before any weights are loaded: tests/train/test_external.py."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    external = ("weights: frozen", "weights: {kind: external, path: other}")
    code, err = sdkit("validate", external)
    assert code == 1
    assert "run.yaml:7:35: another vocabulary than the student's: " in err


def test_rows_without_their_context_are_reported_and_not_counted(sdkit, tmp_path):
    code, err = sdkit("train", ('d: "2 + 2 = 4"', "d: null"))
    assert (code, err) == (0, "")
    (line,) = (
        line
        for line in map(json.loads, (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines())
        if "grad_norm" in line
    )
    assert line["rollout/with_teacher"] == 0.5
    assert line["distil/empty_rows"] == 0.5
