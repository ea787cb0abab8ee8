"""Rewards: extraction of answers, comparisons, weighted sums, users' functions, mathematics."""

import math
import re
import subprocess
import sys
import time

import pytest

from sdkit.data.rows import load_rows
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import (
    ChoiceReward,
    DataSpec,
    ExactReward,
    FileReward,
    JsonLinesSource,
    LastChoice,
    LastNumber,
    MathVerifyReward,
    NumberReward,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Table,
    Tagged,
    WeightedReward,
    WholeText,
)
from sdkit.rewards import math as rewards_math
from sdkit.rewards.answers import extract
from sdkit.rewards.scoring import ScoredCompletion, open_reward, open_rewards, reward_values, score


def open_value(reward, base="/", source=None):
    """The reward as a function of completion and row that returns a number."""
    scorer = open_reward(reward, base, source)
    return lambda completion, row: scorer(completion, row).reward


def reward_lists(rewards, completions, rows):
    return reward_values(score(rewards, completions, rows))


def test_whole_text_is_stripped():
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
def test_tagged_extracts_the_last_complete_tag(text, answer):
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
def test_last_number_is_extracted(text, answer):
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
def test_last_choice_is_extracted(text, answer):
    assert extract(LastChoice(), text) == answer


def test_exact_reward(make_row):
    row = make_row(answer=" Paris ")
    assert open_value(ExactReward())("Paris\n", row) == 1.0
    assert open_value(ExactReward())("paris", row) == 0.0
    assert open_value(ExactReward(ignore_case=True))("pARIS", row) == 1.0
    assert open_value(ExactReward(extract=Tagged()))("Paris", row) == 0.0
    assert open_value(ExactReward(answer="n"))("7", make_row(n=7)) == 1.0


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
def test_number_reward(make_row, completion, answer, value):
    assert open_value(NumberReward())(completion, make_row(answer=answer)) == value


def test_number_tolerance(make_row):
    reward = open_value(NumberReward(tolerance=0.5))
    assert [reward(text, make_row(answer="10")) for text in ("10.5", "9.5", "10.51")] == [1, 1, 0]
    tagged = open_value(NumberReward(extract=Tagged()))
    assert tagged("<answer>10</answer> 11", make_row(answer="10")) == 1.0
    assert tagged("<answer>10 apples</answer>", make_row(answer="10")) == 0.0


def test_choice_reward(make_row):
    row = make_row(answer="B")
    assert open_value(ChoiceReward())("Not A but (B).", row) == 1.0
    assert open_value(ChoiceReward())("Not B but A.", row) == 0.0
    tagged = open_value(ChoiceReward(extract=Tagged()))
    assert tagged("A <answer>\n(B)\n</answer>", row) == 1.0
    assert tagged("B", row) == 0.0


def test_regex_reward(make_row):
    reward = open_value(RegexReward(pattern="^yes$"))
    assert [reward(text, make_row()) for text in (" yes\n", "yes, sir", "no\nyes")] == [1, 0, 0]
    with pytest.raises(BadData, match="cannot be read: "):
        open_value(RegexReward(pattern="("))


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (ExactReward(), {}, "row 4 has no right answer in the column 'answer'"),
        (NumberReward(), {"answer": None}, "row 4 has no right answer"),
        (NumberReward(), {"answer": "ten"}, "row 4: 'ten' in the column 'answer' is not a number"),
        (ChoiceReward(), {"answer": "BC"}, "row 4: 'BC' in the column 'answer' is not a capital"),
    ],
)
def test_row_without_a_right_answer_is_named(make_row, reward, columns, message):
    with pytest.raises(BadData, match=message):
        open_value(reward)("5 B", make_row(index=4, **columns))


def test_score_returns_every_reward_of_every_row(make_row):
    rows = [make_row(answer="1"), make_row(answer="2")]
    rewards = {n: open_reward(r, "/", None) for n, r in (("exact", ExactReward()), ("number", NumberReward()))}
    assert reward_lists(rewards, ["1", "it is 2"], rows) == {"exact": [1.0, 0.0], "number": [1.0, 1.0]}
    with pytest.raises(ValueError, match="longer"):
        score(rewards, ["1"], rows)


def gym(task, **options):
    source = ReasoningGymSource(task=task, size=3, seed=1, options=Table(options))
    columns = Table({"prompt": "question", "answer": "answer"})
    return source, load_rows(DataSpec(source=source, columns=columns), "/")


def test_reasoning_gym_scores_its_own_answers():
    source, rows = gym("chain_sum")
    reward = open_value(ReasoningGymReward(), source=source)
    tagged = open_value(ReasoningGymReward(extract=Tagged()), source=source)
    for row in rows:
        assert reward(f" {row.columns['answer']}\n", row) == 1.0
        assert reward("no idea", row) == 0.0
        assert tagged(f"so <answer>{row.columns['answer']}</answer>", row) == 1.0
        assert tagged(row.columns["answer"], row) == 0.0


def test_partial_credit_counts_only_if_requested():
    source, rows = gym("chain_sum")
    almost_right = f"it is {rows[0].columns['answer']}"
    partial = open_value(ReasoningGymReward(full_marks_only=False), source=source)(almost_right, rows[0])
    assert 0 < partial < 1
    assert open_value(ReasoningGymReward(), source=source)(almost_right, rows[0]) == 0.0


def test_answer_that_breaks_the_scorer_is_wrong(make_row):
    source, rows = gym("prime_factorization")
    reward = open_value(ReasoningGymReward(), source=source)
    assert reward(rows[0].columns["answer"], rows[0]) == 1.0
    assert reward("two times three", rows[0]) == 0.0
    with pytest.raises(BadData, match="row 2 cannot be scored by its task"):
        reward("2 × 3", make_row(index=2))  # no row of the task


def test_reasoning_gym_reward_needs_its_task():
    with pytest.raises(BadData, match="needs data of kind reasoning_gym"):
        open_value(ReasoningGymReward())


USER_FILE = """
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
def commented(completion, row):
    return (0.5, "too short") if len(completion) < 3 else (1, None)
def numbered(completion, row):
    return 1.0, 2
def three(completion, row):
    return 1.0, "a", "b"
def complex_(completion, row):
    return 1j
def huge(completion, row):
    return 10 ** 400
def sleepy(completion, row):
    import time
    if completion == "slow":
        time.sleep(60)
    return 1.0
def together(completion, row):
    import time
    time.sleep(0.3)
    return float(completion)
def leaves(completion, row):
    raise SystemExit
"""


@pytest.fixture
def user_reward(tmp_path):
    """Opens a function of `OWN`."""
    (tmp_path / "mine.py").write_text(USER_FILE)
    return lambda name, **more: open_reward(FileReward(file="mine.py", function=name, **more), tmp_path, None)


def test_user_function_returns_a_number_or_boolean(user_reward, make_row):
    row = make_row("P", answer="yes")
    assert user_reward("share")("hello", row).reward == 0.5
    assert row.columns["prompt"] == "P"
    assert user_reward("right")("yes", row) == ScoredCompletion(reward=1.0)
    assert user_reward("right")("no", row) == ScoredCompletion(reward=0.0)


def test_user_function_can_return_feedback(user_reward, make_row):
    assert user_reward("commented")("x", make_row()) == ScoredCompletion(reward=0.5, feedback="too short")
    assert user_reward("commented")("long enough", make_row()) == ScoredCompletion(reward=1.0)


def test_failing_function_names_its_line_and_the_sample(user_reward, make_row):
    with pytest.raises(BadData) as caught:
        user_reward("fails")("the text", make_row(index=6))
    error = caught.value
    assert error.message == "fails failed on row 6, completion 'the text': KeyError: 'nothing'"
    assert (error.place.file, error.place.line) == ("mine.py", 14)
    assert USER_FILE.splitlines()[13].strip() == 'return row["nothing"]'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "'1'"),
        ("nan", "nan"),
        ("numbered", "(1.0, 2)"),
        ("three", "(1.0, 'a', 'b')"),
        ("complex_", "1j"),
        ("huge", "1000"),
    ],
)
def test_function_must_return_a_finite_number(user_reward, make_row, name, value):
    with pytest.raises(BadData, match=f"{name} in mine.py returned {re.escape(value)}.* for row 2, completion 'x'"):
        user_reward(name)("x", make_row(index=2))


def test_file_that_cannot_be_loaded_is_named(user_reward, tmp_path):
    with pytest.raises(BadData, match="no function 'shar'") as caught:
        user_reward("shar")
    assert caught.value.hint == 'did you mean "share"?'
    with pytest.raises(BadData, match=r"there is no file none\.py"):
        open_value(FileReward(file="none.py", function="f"), tmp_path)
    (tmp_path / "bad.py").write_text("x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(BadData, match=r"bad\.py cannot be loaded: ModuleNotFoundError") as caught:
        open_value(FileReward(file="bad.py", function="f"), tmp_path)
    assert caught.value.place.line == 2
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(BadData, match="SyntaxError") as caught:
        open_value(FileReward(file="bad.py", function="f"), tmp_path)
    assert caught.value.place.line == 2


def test_slow_function_ends_the_run_and_names_the_sample(user_reward, make_row):
    rows = [make_row(index=i) for i in range(3)]
    started = time.monotonic()
    with pytest.raises(BadData, match=r"sleepy in mine.py took more than 0.5 s on row 1, completion 'slow'"):
        score({"own": user_reward("sleepy", seconds=0.5)}, ["x", "slow", "y"], rows)
    assert time.monotonic() - started < 5
    assert reward_lists({"own": user_reward("sleepy", seconds=20)}, ["x"], rows[:1]) == {"own": [1.0]}


def test_slow_function_does_not_keep_the_process_alive(tmp_path):
    (tmp_path / "mine.py").write_text(USER_FILE)
    program = f"""
from pathlib import Path
from sdkit.batches import Row
from sdkit.rewards.scoring import open_reward
from sdkit.language.specs import FileReward
reward = FileReward(file="mine.py", function="sleepy", seconds=0.2)
scorer = open_reward(reward, Path({str(tmp_path)!r}), None)
scorer("slow", Row(index=1, messages=(), columns={{}}, raw={{}}))
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert "BadData: sleepy in mine.py took more than 0.2 s" in done.stderr
    assert time.monotonic() - started < 40


def test_parallel_calls_keep_their_order(user_reward, make_row):
    rows = [make_row(index=i) for i in range(8)]
    texts = [str(i) for i in range(8)]
    started = time.monotonic()
    rewards = reward_lists({"own": user_reward("together", at_once=8, seconds=20)}, texts, rows)
    assert rewards == {"own": [float(i) for i in range(8)]}
    assert time.monotonic() - started < 8 * 0.3
    with pytest.raises(BadData, match=r"fails failed on row \d, completion '\d'"):
        score({"own": user_reward("fails", at_once=8)}, texts, rows)


def test_function_that_exits_has_failed(user_reward, make_row):
    with pytest.raises(BadData, match="leaves failed on row 0"):
        user_reward("leaves")("x", make_row())


def test_weighted_sum_reports_its_parts_and_calls_each_once(user_reward, make_row, tmp_path):
    rewards = {
        "total": WeightedReward(parts=Table({"right": 1.0, "commented": 0.5, "half": 2.0})),
        "half": WeightedReward(parts=Table({"right": 0.5})),
        "right": ExactReward(),
        "commented": FileReward(file="mine.py", function="commented"),
    }
    scorers = open_rewards(rewards, ["total", "commented"], tmp_path, None)
    calls = []
    score_all = scorers["commented"].score_all
    object.__setattr__(scorers["commented"], "score_all", lambda pairs: calls.append(pairs) or score_all(pairs))
    judged = score(scorers, ["4", "five"], [make_row(answer="4")] * 2)
    assert reward_values(judged) == {
        "total": [1 + 0.25 + 1, 0.5],
        "total/right": [1.0, 0.0],
        "total/commented": [0.5, 1.0],
        "total/half": [0.5, 0.0],
        "commented": [0.5, 1.0],
    }
    assert [j.feedback for j in judged["total"]] == ["too short", None]
    assert len(calls) == 1
    assert scorers["total"]("4", make_row(answer="4")).reward == 2.25
    assert score(scorers, [], []) == {"total": [], "commented": []}


def test_reward_that_cannot_be_opened_is_named(tmp_path):
    rewards = {"mine": FileReward(file="none.py", function="f")}
    with pytest.raises(BadData, match=r"rewards\.mine: there is no file none\.py"):
        open_rewards(rewards, ["mine"], tmp_path, None)


@pytest.fixture(scope="module")
def math_reward():
    scorer = open_reward(MathVerifyReward(seconds=20), "/", None)
    return lambda completion, row: scorer(completion, row).reward


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("it is 0.5", "1/2", 1.0),
        ("it is $\\frac{2}{4}$", "0.5", 1.0),
        ("so \\boxed{1/2}, not 3", "\\frac12", 1.0),
        ("\\boxed{\\{3, 1, 2\\}}", "\\{1,2,3\\}", 1.0),
        ("\\boxed{\\{3, 1\\}}", "\\{1,2,3\\}", 0.0),
        ("\\boxed{(x+1)^2}", "$x^2+2x+1$", 1.0),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1.0),
        ("\\boxed{(1, 2)}", "(2, 1)", 0.0),
        ("\\boxed{0.333}", "1/3", 0.0),
        ("\\boxed{7}", 7, 1.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_verify_compares_values(math_reward, make_row, completion, answer, value):
    assert math_reward(completion, make_row(answer=answer)) == value


def test_math_verify_in_parallel_with_another_extract(make_row):
    rows = [make_row(answer=f"{i}/4") for i in range(1, 9)]
    scorer = open_reward(MathVerifyReward(extract=Tagged(), seconds=20), "/", None)
    texts = [f"9 <answer>{i * 0.25}</answer>" for i in range(1, 9)]
    assert reward_lists({"m": scorer}, texts, rows) == {"m": [1.0] * 8}
    assert scorer("0.25", rows[0]).reward == 0.0


def test_power_tower_is_wrong_and_does_not_block_the_run(make_row):
    scorer = open_reward(MathVerifyReward(seconds=2), "/", None)
    started = time.monotonic()
    judged = scorer("\\boxed{9^{9^{9^{9}}} + 1}", make_row(answer="7"))
    assert judged.reward == 0.0
    assert time.monotonic() - started < 30
    assert scorer("\\boxed{7}", make_row(answer="7")).reward == 1.0


def test_right_answer_must_be_mathematics(make_row):
    scorer = open_reward(MathVerifyReward(seconds=20), "/", None)
    with pytest.raises(BadData, match=r"row 3: '\$\$' in the column 'answer' is nothing that math-verify"):
        scorer("7", make_row(index=3, answer="$$"))
    with pytest.raises(BadData, match="row 4 has no right answer"):
        scorer("7", make_row(index=4))


def test_missing_math_verify_is_reported(monkeypatch):
    monkeypatch.setattr(rewards_math.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadEnvironment, match="math-verify"):
        open_reward(MathVerifyReward(), "/", None)


def test_sciknoweval_answers_score_one(real_data):
    columns = Table({"prompt": "prompt", "system": "system", "answer": "answer"})
    source = JsonLinesSource(path="sciknoweval/physics-test.json")
    rows = load_rows(DataSpec(source=source, columns=columns), real_data)
    rewards = {
        "tagged": open_reward(ExactReward(extract=Tagged()), "/", None),
        "choice": open_reward(ChoiceReward(), "/", None),
    }
    right = [f"<reasoning>I saw.</reasoning><answer>\n{r.columns['answer']}\n</answer>" for r in rows]
    assert reward_lists(rewards, right, rows) == {"tagged": [1.0] * 80, "choice": [1.0] * 80}
    guesses = reward_lists(rewards, ["<answer>A</answer>"] * 80, rows)
    assert guesses["tagged"] == guesses["choice"]
    assert 0 < math.fsum(guesses["tagged"]) < 80


def test_tooluse_answers_match_as_text(real_data):
    columns = Table({"prompt": "prompt", "answer": "answer"})
    source = JsonLinesSource(path="tooluse/test.json")
    rows = load_rows(DataSpec(source=source, columns=columns), real_data)
    reward = {"exact": open_reward(ExactReward(), "/", None)}
    texts = [row.columns["answer"] for row in rows]
    assert reward_lists(reward, texts, rows) == {"exact": [1.0] * 68}
    assert reward_lists(reward, ["{}"] * 68, rows) == {"exact": [0.0] * 68}
