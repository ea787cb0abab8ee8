"""Shell completion: commands, spec files, keys and values of overrides, and names to explain."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import BAD, GOOD

from sdkit.cli.completion import explained_names, spec_files
from sdkit.language.completions import override_words, value_words
from sdkit.language.overlay import load

ROOT = Path(__file__).resolve().parents[2]
DEMO = load(ROOT / "specs" / "sdft.yaml").data


def keys(incomplete, data=DEMO):
    return [word for word, _ in override_words(incomplete, data)]


def values(path, data=DEMO):
    return [word for word, _ in value_words(path, data)]


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["expl"], ["explain"]),
        (["train", "specs/sdf"], ["specs/sdft.yaml"]),
        (["train", "specs/sdft.yaml", "optimizer.l"], ["optimizer.lr=", "optimizer.lr_scheduler_type="]),
        (["train", "specs/sdft.yaml", "losses.distil.divergence", "=", "j"], ["jsd"]),  # as bash splits it
        (["train", "specs/sdft.yaml", "optimizer.lr", "="], ["5.0e-5"]),
        (["train", "specs/sdft.yaml", "optimizer.lr", "=", "1", "machine.r"], ["machine.ranks=", "machine.ranks=1"]),
        (["train", "none.yaml", "machine.r"], ["machine.ranks=", "machine.ranks=1"]),
        (["explain", "no_teach"], ["no_teacher"]),
        (["methods", "dr_"], ["dr_grpo"]),
    ],
)
def test_bash_completes(words, completions):
    environment = {"COMP_WORDS": "\n".join(["sdkit", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", "from sdkit.cli import main; import sys; sys.argv = ['sdkit']; main()"],
        env=os.environ | environment | {"_SDKIT_COMPLETE": "complete_bash"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == completions
    assert done.stderr == ""


def test_keys_are_completed_to_the_next_dot():
    assert {"rollout.", "optimizer.", "reward=", "method="} <= set(keys(""))
    assert keys("losses.distil.av") == ["losses.distil.average.", "losses.distil.average="]
    assert "evaluation.suites.sums." in keys("evaluation.suites.")
    assert "rollout.stop=" in keys("rollout.")


def test_the_only_completion_is_followed_by_what_can_come_next():
    assert keys("optimi")[:2] == ["optimizer.", "optimizer.lr="]
    assert keys("optimizer.lr_") == [
        "optimizer.lr_scheduler_type=",
        "optimizer.lr_scheduler_type=constant",
        "optimizer.lr_scheduler_type=linear",
        "optimizer.lr_scheduler_type=cosine",
    ]


def test_keys_below_a_choice_are_those_of_its_kind():
    weights = {"teacher": {"weights": {"kind": "ema"}}}
    assert keys("teacher.weights.", weights) == [
        "teacher.weights.kind=",
        "teacher.weights.update_rate=",
        "teacher.weights.every=",
    ]
    assert keys("teacher.weights.u", weights) == ["teacher.weights.update_rate="]
    assert "teacher.weights.update_rate=" in keys("teacher.weights.", None)
    weights["teacher"]["weights"]["update_rate"] = {"from": 0.1, "to": 0, "steps": 5}
    assert "teacher.weights.update_rate.to=" in keys("teacher.weights.update_rate.", weights)
    assert keys("teacher.weights.", {"teacher": {"weights": "frozen"}})[0] == "teacher.weights.kind="


def test_values_are_choices_and_the_value_of_the_spec():
    assert values("losses.distil.divergence")[:3] == ["forward_kl", "reverse_kl", "jsd"]
    assert "file" not in values("losses.distil.divergence")  # it has required keys
    assert "file" in values("losses.distil.divergence.kind")
    assert values("model.lora") == ["null"]
    assert values("training.share_prompts") == ["true", "false"]
    assert values("optimizer.lr") == ["5.0e-5"]
    assert {"sdft", "grpo"} <= set(values("method"))
    assert values("no.such.key") == []


@pytest.mark.parametrize("path", [*BAD, *GOOD][::7], ids=lambda path: path.stem)
def test_a_spec_is_completed_even_with_problems(path):
    data = load(path).data
    levels = [""]
    for prefix in levels:
        levels += [word for word in keys(prefix, data) if word.endswith(".") and word != prefix][:8]
    assert len(levels) > 1


def test_only_folders_and_specs_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "rewards.py", ".hidden.yaml", "methods/mine.yml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert [word for word, _ in spec_files("r")] == [
        "run.yaml",
        "reopold_phase1",
        "reopold_phase2",
        "revisiting_opd",
        "rft",
        "rlsd",
    ]
    assert [word for word, _ in spec_files("./")] == ["./methods/", "./run.yaml"]
    assert [word for word, _ in spec_files("meth")] == ["methods/", "methods/mine.yml"]
    assert spec_files("none/") == []


def test_names_to_explain():
    assert "optimizer.lr" in explained_names("optimizer.")
    assert {"teacher_share", "teacher_model"} <= set(explained_names("teacher_"))
