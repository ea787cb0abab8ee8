"""Sequence files: golden error texts, and the run that each stage becomes."""

from pathlib import Path

import pytest
from golden import BAD_SEQUENCES, validate_output, validated

from sdkit.language.formatting import format_spec
from sdkit.language.sequences import describe, is_sequence, load_sequence

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests" / "err" / "sequences" / "runs"
SHIPPED = [path for path in sorted(ROOT.glob("specs/**/*.yaml")) if is_sequence(path)]


@pytest.mark.parametrize("path", BAD_SEQUENCES, ids=lambda p: p.stem)
def test_bad_sequence_prints_its_golden_text(path):
    assert validate_output(path) == path.with_suffix(".out").read_text(encoding="utf-8")
    expected = {"type-stage": {"type", "unknown_key"}}.get(path.stem, {path.stem.split("-")[0]})
    assert {p.code for p in validated(path).problems} == expected


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_sequence_has_no_problem_and_is_formatted(path):
    sequence = load_sequence(path)
    assert {p.code for p in sequence.problems} <= {"dropped_keys"}
    assert sequence.ok
    assert format_spec(path)[1] == path.read_text(encoding="utf-8")


@pytest.fixture
def sequence(tmp_path):
    """Checks a sequence of the two small runs, written as YAML."""

    def load(text, *overrides):
        path = tmp_path / "sequence.yaml"
        path.write_text(text.replace("RUNS", str(RUNS)), encoding="utf-8")
        checked = load_sequence(path, overrides)
        assert [p.message for p in checked.problems if p.severity == "error"] == []
        return checked

    return load


TWO = "stages: {sums: {run: RUNS/sums.yaml}, words: {run: RUNS/words.yaml}}"


def test_every_stage_has_all_suites_its_own_first(sequence):
    stages = sequence(TWO).stages
    assert [list(stage.spec.suites) for stage in stages] == [["sums", "words"], ["words", "sums"]]
    assert [stage.suites for stage in stages] == [("sums",), ("words",)]


def test_a_suite_of_another_stage_keeps_its_columns_and_lengths_and_drops_training_rows(sequence):
    text = """
overrides: {evaluation: {teacher_lift: 0}}
stages:
  sums: {run: RUNS/sums.yaml, overrides: {rollout: {max_new_tokens: 5}}}
  words:
    run: RUNS/words.yaml
    overrides: {data: {columns: {demonstration: prompt}}}
"""
    first, second = sequence(text).stages
    foreign = second.spec.suites["sums"]
    assert foreign.data.columns["demonstration"] == "demonstration"
    assert (foreign.max_new_tokens, foreign.same_prompts, foreign.loss_prompts) == (5, "drop", 0)
    assert second.spec.suites["words"].max_new_tokens is None
    assert first.spec.suites["words"].data.columns["demonstration"] == "prompt"
    assert first.spec.evaluation.teacher_lift == 0


def test_overrides_go_from_the_sequence_to_the_stage_to_the_command_line(sequence):
    text = "overrides: {optimizer: {lr: 1.0e-4, eps: 1.0e-7}, training: {steps: 5}}\n" + TWO.replace(
        "words.yaml", "words.yaml, overrides: {optimizer: {lr: 2.0e-4}, method: sft, teacher: null}"
    )
    first, second = sequence(text, "training.steps=7").stages
    assert [stage.spec.optimizer.lr for stage in (first, second)] == [1e-4, 2e-4]
    assert {stage.spec.optimizer.eps for stage in (first, second)} == {1e-7}
    assert {stage.spec.training.steps for stage in (first, second)} == {7}
    assert [list(stage.spec.losses) for stage in (first, second)] == [["distil"], ["imitate"]]


def test_the_only_reward_stays_the_one_that_trains(sequence):
    text = TWO.replace(
        "words.yaml",
        "words.yaml, overrides: {method: grpo, teacher: null, rewards: {other: {kind: exact, answer: demonstration}}, "
        "reward: other, evaluation: {suites: {words: {score: other}}}}",
    )
    words = sequence(text).stages[1].spec
    assert words.reward == "other"
    assert list(words.rewards) == ["strict", "other"]


def test_a_sequence_says_what_it_does(sequence):
    text = "retention: [sums]\ncarry_over: [optimizer]\n" + TWO.replace("sums: {", "first: {").replace(
        "sums.yaml", "sums.yaml, overrides: {evaluation: {suites: {more: {data: {source: {kind: inline, rows: "
        "[{prompt: a, demonstration: b}]}}, score: strict}}}}",
    )  # fmt: skip
    assert describe(sequence(text)) == [
        "stage 1, first: from the start model; measured by 'more'",
        "stage 2, words: from the weights of first; measured by 'words'",
        "carried over from stage to stage: optimizer",
        "anew in every stage: teacher",
        "retention suites: sums",
    ]


def test_a_reward_whose_name_is_taken_gets_the_name_of_its_stage(sequence):
    text = TWO.replace(
        "words.yaml",
        "words.yaml, overrides: {rewards: {strict: {ignore_case: true}, both: {kind: weighted, parts: {strict: 1}}}, "
        "evaluation: {suites: {words: {also: [both]}}}}",
    )
    first, second = (stage.spec for stage in sequence(text).stages)
    assert (first.suites["words"].score, first.suites["words"].also) == ("words_strict", ("both",))
    assert first.rewards["words_strict"].ignore_case
    assert list(first.rewards["both"].parts) == ["words_strict"]
    assert not first.rewards["strict"].ignore_case
    assert second.suites["sums"].score == "sums_strict"
