"""Answers in completions, and what they are worth."""

import math

import pytest

from sdkit.components.data import load_rows
from sdkit.components.rewards import extract, open_reward, score
from sdkit.problems import BadData
from sdkit.specs import (
    ChoiceReward,
    DataSpec,
    ExactReward,
    FileReward,
    JsonLinesSource,
    LastChoice,
    LastNumber,
    NumberReward,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Table,
    Tagged,
    WholeText,
)


def opened(reward, base="/", source=None):
    return open_reward(reward, base, source)


# ── extraction ────────────────────────────────────────────────────────────────────────────────


def test_the_whole_text_is_stripped():
    assert extract(WholeText(), " \n a b\n") == "a b"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>A</answer> no, <answer>\nB\n</answer> done", "B"),
        ("<answer>A</answer> <answer>B", None),
        ("B</answer>", None),
        ("no tag", None),
        ("<answer></answer>", ""),
    ],
)
def test_tagged(text, answer):
    assert extract(Tagged(), text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("4 and then -7", "-7"),
        ("4 and then −7", "−7"),
        ("10-20", "20"),
        ("f(2)-3", "3"),
        ("x = -3", "-3"),
        ("\\boxed{-1,234.50}", "-1,234.50"),
        ("$1,234,567", "1,234,567"),
        ("1,2345", "2345"),
        ("1, 2, 3", "3"),
        ("about 6.02e23 of them", "6.02e23"),
        ("1.5E-3", "1.5E-3"),
        ("costs .5", ".5"),
        ("12cm", "12"),
        ("7 H2O", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert extract(LastNumber(), text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A or B? (B)", "B"),
        ("Answer: C", "C"),
        ("**D**.", "D"),
        ("The answer is (B). I think so. It's DNA.", "B"),
        ("(B). I'm sure", "B"),
        ("B2, AB, a", None),
        ("I", "I"),
    ],
)
def test_last_choice(text, answer):
    assert extract(LastChoice(), text) == answer


# ── comparisons ───────────────────────────────────────────────────────────────────────────────


def test_exact(make_row):
    row = make_row(answer=" Paris ")
    assert opened(ExactReward())("Paris\n", row) == 1.0
    assert opened(ExactReward())("paris", row) == 0.0
    assert opened(ExactReward(ignore_case=True))("pARIS", row) == 1.0
    assert opened(ExactReward(extract=Tagged()))("Paris", row) == 0.0
    assert opened(ExactReward(answer="n"))("7", make_row(n=7)) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so it is 1,000.0", 1000, 1.0),
        ("so it is 1e3", "1,000", 1.0),
        ("-5", "-5", 1.0),
        ("−5", -5, 1.0),
        ("5", "-5", 0.0),
        ("0.3333333", 1 / 3, 1.0),
        ("0.333", 1 / 3, 0.0),
        ("12345678901234567891", "12345678901234567890", 0.0),
        ("1e999999999999999999999", "5", 0.0),
        ("1" * 6000, "5", 0.0),
        ("no number", "5", 0.0),
    ],
)
def test_number(make_row, completion, answer, value):
    assert opened(NumberReward())(completion, make_row(answer=answer)) == value


def test_number_tolerance(make_row):
    reward = opened(NumberReward(tolerance=0.5))
    assert [reward(text, make_row(answer="10")) for text in ("10.5", "9.5", "10.51")] == [1, 1, 0]
    tagged = opened(NumberReward(extract=Tagged()))
    assert tagged("<answer>10</answer> 11", make_row(answer="10")) == 1.0
    assert tagged("<answer>10 apples</answer>", make_row(answer="10")) == 0.0


def test_choice(make_row):
    row = make_row(answer="B")
    assert opened(ChoiceReward())("Not A but (B).", row) == 1.0
    assert opened(ChoiceReward())("Not B but A.", row) == 0.0
    tagged = opened(ChoiceReward(extract=Tagged()))
    assert tagged("A <answer>\n(B)\n</answer>", row) == 1.0
    assert tagged("B", row) == 0.0


def test_regex(make_row):
    reward = opened(RegexReward(pattern="^yes$"))
    assert [reward(text, make_row()) for text in (" yes\n", "yes, sir", "no\nyes")] == [1, 0, 0]
    with pytest.raises(BadData, match="cannot be read: "):
        opened(RegexReward(pattern="("))


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (ExactReward(), {}, "row 4 has no right answer in the column 'answer'"),
        (NumberReward(), {"answer": None}, "row 4 has no right answer"),
        (NumberReward(), {"answer": "ten"}, "row 4: 'ten' in the column 'answer' is not a number"),
        (ChoiceReward(), {"answer": "BC"}, "row 4: 'BC' in the column 'answer' is not a capital"),
    ],
)
def test_rows_without_a_right_answer(make_row, reward, columns, message):
    with pytest.raises(BadData, match=message):
        opened(reward)("5 B", make_row(index=4, **columns))


def test_score(make_row):
    rows = [make_row(answer="1"), make_row(answer="2")]
    rewards = {"exact": opened(ExactReward()), "number": opened(NumberReward())}
    assert score(rewards, ["1", "it is 2"], rows) == {"exact": [1.0, 0.0], "number": [1.0, 1.0]}
    with pytest.raises(ValueError, match="longer"):
        score(rewards, ["1"], rows)


# ── reasoning-gym ─────────────────────────────────────────────────────────────────────────────


def gym(task, **options):
    source = ReasoningGymSource(task=task, size=3, seed=1, options=Table(options))
    columns = Table({"prompt": "question", "answer": "answer"})
    return source, load_rows(DataSpec(source=source, columns=columns), "/")


def test_reasoning_gym_scores_its_own_answers():
    source, rows = gym("chain_sum")
    reward = opened(ReasoningGymReward(), source=source)
    tagged = opened(ReasoningGymReward(extract=Tagged()), source=source)
    for row in rows:
        assert reward(f" {row.columns['answer']}\n", row) == 1.0
        assert reward("no idea", row) == 0.0
        assert tagged(f"so <answer>{row.columns['answer']}</answer>", row) == 1.0
        assert tagged(row.columns["answer"], row) == 0.0


def test_partial_credit_counts_only_where_it_is_wanted():
    source, rows = gym("chain_sum")
    near = f"it is {rows[0].columns['answer']}"
    partial = opened(ReasoningGymReward(full_marks_only=False), source=source)(near, rows[0])
    assert 0 < partial < 1
    assert opened(ReasoningGymReward(), source=source)(near, rows[0]) == 0.0


def test_an_answer_on_which_a_scorer_breaks_is_wrong(make_row):
    source, rows = gym("prime_factorization")
    reward = opened(ReasoningGymReward(), source=source)
    assert reward(rows[0].columns["answer"], rows[0]) == 1.0
    assert reward("two times three", rows[0]) == 0.0
    with pytest.raises(BadData, match="row 2 cannot be scored by its task"):
        reward("2 × 3", make_row(index=2))  # no row of the task


def test_a_task_must_be_known():
    with pytest.raises(BadData, match="needs data of kind reasoning_gym"):
        opened(ReasoningGymReward())


# ── a user's own ──────────────────────────────────────────────────────────────────────────────


OWN = """
from dataclasses import dataclass
@dataclass
class Length:
    text: str
def share(completion, row):
    row["prompt"] = "changed"
    return len(Length(completion).text) / 10
def right(completion, row):
    return completion == row["answer"]
def fails(completion, row):
    return helper(row)
def helper(row):
    return row["nothing"]
def text(completion, row):
    return "1"
def nan(completion, row):
    return float("nan")
"""


@pytest.fixture
def own(tmp_path):
    """Open a function of the file above."""
    (tmp_path / "mine.py").write_text(OWN)
    return lambda name: opened(FileReward(file="mine.py", function=name), tmp_path)


def test_a_function_of_the_users(own, make_row):
    row = make_row("P", answer="yes")
    assert own("share")("hello", row) == 0.5
    assert row.columns["prompt"] == "P"
    assert own("right")("yes", row) == 1.0
    assert own("right")("no", row) == 0.0


def test_a_function_that_fails_names_its_line_and_the_sample(own, make_row):
    with pytest.raises(BadData) as caught:
        own("fails")("the text", make_row(index=6))
    error = caught.value
    assert error.message == "fails failed on row 6, completion 'the text': KeyError: 'nothing'"
    assert (error.place.file, error.place.line) == ("mine.py", 14)
    assert OWN.splitlines()[13].strip() == 'return row["nothing"]'


@pytest.mark.parametrize(("name", "value"), [("text", "'1'"), ("nan", "nan")])
def test_a_function_must_return_a_finite_number(own, make_row, name, value):
    with pytest.raises(BadData, match=f"{name} in mine.py returned {value} for row 2, completion"):
        own(name)("x", make_row(index=2))


def test_files_that_cannot_be_opened(own, tmp_path):
    with pytest.raises(BadData, match="no function 'shar'") as caught:
        own("shar")
    assert caught.value.hint == "did you mean 'share'?"
    with pytest.raises(BadData, match=r"there is no file none\.py"):
        opened(FileReward(file="none.py", function="f"), tmp_path)
    (tmp_path / "bad.py").write_text("x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(BadData, match=r"bad\.py cannot be loaded: ModuleNotFoundError") as caught:
        opened(FileReward(file="bad.py", function="f"), tmp_path)
    assert caught.value.place.line == 2
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(BadData, match="SyntaxError") as caught:
        opened(FileReward(file="bad.py", function="f"), tmp_path)
    assert caught.value.place.line == 2


# ── real data ─────────────────────────────────────────────────────────────────────────────────


def test_sciknoweval_answers_score_themselves(real_data):
    columns = Table({"prompt": "prompt", "system": "system", "answer": "answer"})
    source = JsonLinesSource(path="sciknoweval/physics-test.json")
    rows = load_rows(DataSpec(source=source, columns=columns), real_data)
    rewards = {
        "tagged": opened(ExactReward(extract=Tagged())),
        "choice": opened(ChoiceReward()),
    }
    right = [
        f"<reasoning>I saw.</reasoning><answer>\n{r.columns['answer']}\n</answer>" for r in rows
    ]
    assert score(rewards, right, rows) == {"tagged": [1.0] * 80, "choice": [1.0] * 80}
    guesses = score(rewards, ["<answer>A</answer>"] * 80, rows)
    assert guesses["tagged"] == guesses["choice"]
    assert 0 < math.fsum(guesses["tagged"]) < 80


def test_tooluse_answers_match_as_text(real_data):
    columns = Table({"prompt": "prompt", "answer": "answer"})
    source = JsonLinesSource(path="tooluse/test.json")
    rows = load_rows(DataSpec(source=source, columns=columns), real_data)
    reward = {"exact": opened(ExactReward())}
    texts = [row.columns["answer"] for row in rows]
    assert score(reward, texts, rows) == {"exact": [1.0] * 68}
    assert score(reward, ["{}"] * 68, rows) == {"exact": [0.0] * 68}
