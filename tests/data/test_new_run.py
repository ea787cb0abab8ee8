"""`sdkit new`: a run file from a method, a data file and a few answers, which validates."""

import json

import pytest

from sdkit.data.new_run import Answers, write_run_file
from sdkit.language.errors import BadData, UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.method_pages import method_page
from sdkit.language.overlay import packaged_methods
from sdkit.language.specs import ExperimentSpec

COLUMNS = ("prompt", "demonstration", "solution", "answer", "context", "instruction", "reply", "domain")
ROWS = [{name: f"the {name} {i}" for name in COLUMNS} for i in range(20)]
MODEL = "bundled:smollm2-135m-instruct"


@pytest.fixture
def new(tmp_path, monkeypatch):
    """Writes a run file for rows, and returns its checked spec."""
    monkeypatch.chdir(tmp_path)

    def write(rows=ROWS, ask=None, name="rows.jsonl", **answers):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = tmp_path / "specs" / "new.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text(write_run_file(target, Answers(**{"data": name, "model": MODEL, **answers}), ask))
        return load_spec(target)

    return write


@pytest.mark.parametrize("name", packaged_methods())
def test_every_method_gets_a_run_file_that_validates(new, name):
    teachers = [MODEL] * len(list(method_page(name).spec.external_teachers()))
    checked = new(method=name, teachers=teachers, writer="w" if method_page(name).spec.writer else None)
    assert [p.message for p in checked.problems if p.severity == "error"] == []
    assert isinstance(checked.spec, ExperimentSpec)
    assert checked.spec.model.path == MODEL
    assert checked.spec.data.source.path == "../rows.jsonl"
    assert len(checked.spec.losses) == len(method_page(name).spec.losses)
    assert checked.spec.suites["held_out"].data.limit == 4
    assert not [p for p in checked.problems if p.code == "context_length"]


@pytest.mark.parametrize(
    ("answers", "kind"), [(("1", "-2.5"), "number"), (("A", "D"), "choice"), (("red", "two words"), "exact")]
)
def test_reward_is_read_off_the_answers(new, answers, kind):
    checked = new([{"question": "?", "label": answer} for answer in answers], method="grpo")
    assert checked.spec.rewards["correct"].kind == kind
    assert dict(checked.spec.data.columns) == {"prompt": "question", "answer": "label"}
    assert "answer: label # guessed from its name" in checked.loaded.texts[checked.loaded.name]


def test_a_demonstration_is_not_guessed_among_numbers(new):
    rows = [{"question": "1 + 1", "worked": "1 + 1 = 2", "answer": "2"}]
    with pytest.raises(UnreadableInput) as refused:
        new(rows, method="sdft")
    assert refused.value.message == (
        "which column of rows.jsonl is 'demonstration'; there are 'question', 'worked', 'answer'"
    )
    assert refused.value.hint == "--column demonstration=NAME"
    checked = new(rows, method="sdft", columns={"demonstration": "worked"})
    assert checked.spec.data.columns["demonstration"] == "worked"


def test_the_answer_that_ends_a_chat_is_the_demonstration(new):
    chat = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    checked = new([{"messages": chat}], method="sdft")
    assert checked.spec.data.columns["prompt"] == "messages"
    assert checked.spec.data.columns["demonstration"].last_turn == "messages"


def test_a_chat_is_the_demonstration_that_trajectories_start_with(new):
    chat = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    checked = new([{"messages": chat, "answer": "2"}], method="tcod_back", teachers=[MODEL])
    assert checked.spec.data.columns["demonstration"].turns == "messages"


def test_what_is_missing_is_asked_for(new):
    asked = []

    def ask(question, choices):
        asked.append((question, choices))
        return "Qwen/Qwen3-8B" if "teacher" in question else choices[1]

    checked = new([{"q": "1 + 1", "worked": "1 + 1 = 2"}], ask, method="gkd")
    assert checked.spec.data.columns["demonstration"] == "worked"
    assert checked.spec.teacher.weights.path == "Qwen/Qwen3-8B"
    assert len(asked) == 3


def test_lengths_and_steps_are_taken_over(new):
    spec = new(method="sdpo", max_new_tokens=100, steps=7).spec
    assert (spec.rollout.max_new_tokens, spec.training.steps, spec.training.epochs) == (100, 7, None)
    assert spec.teacher.sees.max_prompt_tokens == 8192 - 100


def test_a_users_function_scores(new, tmp_path):
    (tmp_path / "reward.py").write_text("def right(completion, row):\n    return 1.0\n")
    spec = new([{"prompt": "?"}], method="grpo", reward="reward.py:right").spec
    assert (spec.rewards["correct"].file, spec.rewards["correct"].function) == ("../reward.py", "right")


def test_data_of_the_hub_needs_its_columns(new):
    columns = {"prompt": "question", "answer": "answer"}
    checked = new(method="grpo", data="openai/gsm8k", columns=columns)
    assert checked.ok
    assert checked.spec.data.source.kind == "hub"
    with pytest.raises(UnreadableInput, match="which column of openai/gsm8k is 'prompt'"):
        new(method="grpo", data="openai/gsm8k")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"method": "sdpoo"}, "there is no packaged method 'sdpoo'"),
        ({"method": "gkd"}, "method gkd needs 1 teacher model, and 0 are given"),
        ({"method": "sft", "teachers": ["x"]}, "method sft needs 0 teacher models, and 1 are given"),
        ({"method": "opid"}, "method opid needs a writer"),
        ({"method": "sft", "writer": "x"}, "method sft needs no writer"),
        ({"method": "sft", "columns": {"prompt": "promt"}}, "the data has no column 'promt'"),
        ({"method": "sft", "data": "rows.txt"}, "rows.txt: data is a file that ends in"),
        ({"method": "sft", "reward": "exactly"}, "'exactly' is not one of"),
        ({"method": "sft", "reward": "python_tests"}, "reward python_tests reads the column 'tests'"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(new, answers, message):
    with pytest.raises(UnreadableInput, match=message):
        new(**answers)


def test_a_method_with_rewards_needs_something_to_score(new):
    with pytest.raises(UnreadableInput, match="method grpo needs a reward"):
        new([{"prompt": "?"}], method="grpo")


def test_data_that_cannot_be_read_is_refused(new, tmp_path):
    with pytest.raises(BadData, match="no such file"):
        new(method="sft", data="nowhere.jsonl")
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(BadData, match=r"bad\.jsonl:1: not JSON"):
        new(method="sft", data="bad.jsonl")
