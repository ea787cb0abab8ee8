"""The papers' run files on real prompts of their data sets, if SDKIT_TEST_DATA names their folder."""

import json
from pathlib import Path

import pytest
from attrs import evolve
from tinyruns import advance

from sdkit.batches import Attempt, GroupOutcome
from sdkit.data.prompts import Prompter
from sdkit.data.rows import load_rows
from sdkit.language.load import load_spec
from sdkit.language.specs import ModelSpec, RegexReward, Table, TransformersBackend
from sdkit.rewards.scoring import open_rewards, score
from sdkit.train import scripted_rewards

PAPERS = Path(__file__).resolve().parents[2] / "specs" / "papers"
SETS = {
    "biology": "sciknoweval/biology-train.json",
    "physics": "sciknoweval/physics-train.json",
    "tool_use": "tooluse/test.json",
}
SHOWN = "data.columns={system: system, prompt: prompt, answer: answer, demonstration: answer}"
DEMONSTRATIONS = {"science": ("sciknoweval/biology-test.json", SHOWN), "tool_use": ("tooluse/test.json", SHOWN)}
"""Other data sets with the same questions but without demonstrations; the teacher sees the answer instead."""


def load_paper(name, *overrides):
    checked = load_spec(PAPERS / f"{name}.yaml", overrides)
    assert {problem.code for problem in checked.problems} <= {"dropped_keys"}  # of the source that the test replaces
    return checked.spec


def load_with_rows(real_data, name, file, *overrides):
    """The run file with training rows from the folder of real data."""
    source = f"data.source={{kind: jsonl, path: {real_data / file}}}"
    return load_paper(name, source, *overrides)


def rewards_of(spec, rows, texts):
    scorers = open_rewards(spec.rewards, spec.rewards, PAPERS, None)
    return [j.reward for j in score(scorers, texts, rows)["correct"]]


def calls(row):
    return json.loads(row.columns["answer"])


def format_calls(tool_calls):
    """The tool calls in the format that the prompts require."""
    return "\n".join(
        f"Thought: so\nAction: {call['Action']}\nAction Input: {call['Action_Input']}" for call in tool_calls
    )


@pytest.mark.parametrize(("name", "rows"), [("biology", 450), ("physics", 720)])
@pytest.mark.parametrize("method", ["sdpo", "grpo", "grpo_on_policy"])
def test_answer_letters_are_scored(real_data, method, name, rows):
    spec = load_with_rows(real_data, f"{method}_{name}", SETS[name])
    loaded = load_rows(spec.data, PAPERS)
    assert len(loaded) == rows
    letters = [row.columns["answer"] for row in loaded]
    others = ["A" if letter != "A" else "B" for letter in letters]
    form = "<reasoning>It is {0}.</reasoning>\n<answer>\n{1}\n</answer>"
    right = [form.format("B", letter) for letter in letters]
    assert set(rewards_of(spec, loaded, right)) == {1.0}
    assert set(rewards_of(spec, loaded, [form.format(*p) for p in zip(letters, others, strict=True)])) == {0.0}
    assert set(rewards_of(spec, loaded, letters)) == {0.0}


def test_tool_calls_are_scored_like_the_released_verifiers(real_data):
    """2 of the 68 references contain a nested object or a name in brackets, which the rule cannot read."""
    spec = load_with_rows(real_data, "sdpo_tool_use", SETS["tool_use"])
    rows = load_rows(spec.data, PAPERS)
    right = rewards_of(spec, rows, [format_calls(calls(row)) for row in rows])
    assert (len(right), sum(right)) == (68, 66)
    renamed = [[{**call, "Action": "nothing"} for call in calls(row)] for row in rows]
    assert set(rewards_of(spec, rows, [format_calls(called) for called in renamed])) == {0.0}
    assert sum(rewards_of(spec, rows, [format_calls([*calls(row), calls(row)[0]]) for row in rows])) == 0
    backwards = rewards_of(spec, rows, [format_calls(calls(row)[::-1]) for row in rows])
    single_call = [len(calls(row)) == 1 for row in rows]
    assert all(b == r for b, r, one in zip(backwards, right, single_call, strict=True) if one)
    assert sum(backwards) < sum(right)  # for equal keys the later call wins


def test_teacher_sees_a_sibling_after_the_question(real_data, tiny_tokenizer):
    spec = load_with_rows(real_data, "sdpo_physics", SETS["physics"])
    row = load_rows(spec.data, PAPERS)[0]
    group = [Attempt(text="none", reward=0.0), Attempt(text="It is {B}.", reward=1.0)]
    evidence = GroupOutcome(group=group, own=0, seed=0)
    prompter = Prompter(tiny_tokenizer, {})
    teacher = prompter.teacher_ids(row, spec.teacher.sees, evidence)
    assert teacher is not None
    text = tiny_tokenizer.decode(teacher.ids)
    assert row.prompt_text + "\nCorrect solution:\n\nIt is {B}." in text
    assert row.messages[0]["role"] == "system"
    assert row.messages[0]["content"] in text
    student = tiny_tokenizer.decode(prompter.student_ids(row))
    assert row.prompt_text in student
    assert "Correct solution" not in student


@pytest.mark.parametrize("task", list(DEMONSTRATIONS))
def test_teacher_sees_the_demonstration(real_data, tiny_tokenizer, task):
    file, columns = DEMONSTRATIONS[task]
    spec = load_with_rows(real_data, f"sdft_{task}", file, columns)
    row = load_rows(spec.data, PAPERS)[0]
    teacher = Prompter(tiny_tokenizer, {}).teacher_ids(row, spec.teacher.sees)
    assert teacher is not None
    expected = f"\n{row.prompt_text}\n\nThis is an example for a response to the question:\n"
    assert expected + row.columns["demonstration"] in tiny_tokenizer.decode(teacher.ids)


@pytest.mark.parametrize(
    ("name", "file", "columns"),
    [
        ("sdpo_biology", SETS["biology"], None),
        ("grpo_physics", SETS["physics"], None),
        ("sdft_tool_use", *DEMONSTRATIONS["tool_use"]),
        ("sft_science", *DEMONSTRATIONS["science"]),
    ],
)
def test_step_on_real_prompts(real_data, open_tiny, tiny_folder, name, file, columns):
    spec = load_with_rows(real_data, name, file, *([columns] if columns else []))
    backend = TransformersBackend()
    small = evolve(
        spec,
        model=ModelSpec(path=str(tiny_folder), dtype="float32"),
        data=evolve(spec.data, limit=4),
        rollout=evolve(spec.rollout, max_new_tokens=16, max_prompt_tokens=None, backend=backend),
        teacher=spec.teacher and evolve(spec.teacher, sees=evolve(spec.teacher.sees, max_prompt_tokens=None)),
        rewards=Table({"correct": RegexReward(pattern=".")}),
        evaluation=None,
        optimizer=evolve(spec.optimizer, warmup_steps=0),
        training=evolve(spec.training, steps=1, epochs=None, prompts_per_step=2, updates_per_rollout=1),
    )
    trainer = open_tiny(small)
    trainer.setup.data.train_rewards = dict.fromkeys(trainer.setup.data.train_rewards, scripted_rewards.scorer(spec))
    result = advance(trainer, 1)[0]
    assert 0 < result.metrics["grad_norm"] < float("inf")
