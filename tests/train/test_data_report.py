"""What `validate --data` and `train --dry-run` say about rows and rewards."""

from io import StringIO

import pytest
from attrs import evolve
from rich.console import Console
from tinyruns import make_spec, rollout, with_evaluation

from sdkit.language.errors import BadData
from sdkit.language.specs import DataSpec, ExactReward, FileReward, InlineSource, Suite, Table
from sdkit.train.data_report import report_data
from sdkit.train.reward_trial import mean_scores, try_rewards

NAMES = ("prompt", "demonstration", "answer")
COLUMNS = Table({name: name for name in NAMES})
LEAK = "a demonstration of more than twenty characters"


def rows(*values):
    source = InlineSource(rows=tuple(Table(dict(zip(NAMES, row, strict=True))) for row in values))
    return DataSpec(source=source, columns=COLUMNS)


def report(spec, base, shown=0):
    screen = Console(file=StringIO(), width=200)
    data = report_data(spec, base, screen, shown)
    return data, screen.file.getvalue()


def odd_spec(folder):
    """Training rows with a repeat, an empty answer, a leak, a control token, and one prompt that is held out."""
    data = rows(
        ("1 + 1", "2", "2"),
        ("1 + 1", "two", "2"),
        ("2 + 2", "4 <|im_end|>", ""),
        (f"3 + 3, {LEAK}", LEAK, "6"),
        ("held out", "8", "8"),
    )
    spec = evolve(with_evaluation(make_spec(folder, data=data)), rewards=Table({"right": ExactReward()}))
    held_out = Suite(data=rows(("held out", "8", "8"), ("held out", "8", "8")), score="right")
    return evolve(spec, evaluation=evolve(spec.evaluation, suites=Table({"sums": held_out})))


def test_oddities_of_accepted_rows_are_reported(tiny_folder, tmp_path):
    _, text = report(odd_spec(tiny_folder), tmp_path)
    assert "data: 4 training rows, 1 prompt in suite sums; longest prompt and completion:" in text
    for warning in (
        "control tokens in 1 row, which the model reads as such: row 2 <|im_end|>",
        "1 training row dropped, because a suite holds the same prompt",
        "1 training row with the prompt of an earlier row",
        "1 row of suite sums dropped, with the prompt of an earlier row",
        "'answer' is empty in 1 row: 2",
        "the student's prompt has the text of 'demonstration' in 1 row: 3",
    ):
        assert f"warning: {warning}\n" in text


def test_rows_without_oddities_cause_no_warning(tiny_folder, tmp_path):
    _, text = report(make_spec(tiny_folder), tmp_path, shown=1)
    assert "warning" not in text
    assert text.count("student:") == 1


def test_cut_contexts_are_reported(tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, data=rows(("1 + 1", "2 " * 200, "2")))
    sees = evolve(spec.teacher.sees, max_prompt_tokens=100)
    _, text = report(evolve(spec, teacher=evolve(spec.teacher, sees=sees)), tmp_path)
    assert "the teacher's context is cut at teacher.sees.max_prompt_tokens, by up to " in text


def test_rows_that_a_run_refuses_are_refused(tiny_folder, tmp_path):
    with pytest.raises(BadData, match="more than 2"):
        report(make_spec(tiny_folder, rollout=rollout(max_prompt_tokens=2)), tmp_path)


def test_rewards_are_called_on_the_rows_own_texts(tiny_folder, tmp_path):
    spec = evolve(make_spec(tiny_folder, data=rows(("1 + 1", "2", "2"), ("2 + 2", "four", "4"))))
    data, _ = report(evolve(spec, rewards=Table({"right": ExactReward()})), tmp_path)
    scores = mean_scores(data, data.train_rewards, data.train)
    assert scores["right"] == {
        "the text of 'answer'": 1.0,
        "the text of 'demonstration'": 0.5,
        "an empty completion": 0.0,
    }


def test_reward_that_raises_on_a_real_completion_is_found(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text("def right(completion, row):\n    return 1 / (not completion)\n")
    reward = FileReward(file="mine.py", function="right")
    spec = evolve(make_spec(tiny_folder), rewards=Table({"right": reward}))
    data, _ = report(spec, tmp_path)
    with pytest.raises(BadData, match="ZeroDivisionError"):
        try_rewards(data, Console(file=StringIO()))


def test_reward_that_tells_nothing_apart_is_warned_about(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text("def right(completion, row):\n    return 1.0\n")
    reward = FileReward(file="mine.py", function="right")
    data, _ = report(evolve(make_spec(tiny_folder), rewards=Table({"right": reward})), tmp_path)
    screen = Console(file=StringIO(), width=200)
    try_rewards(data, screen)
    assert "right does not tell the rows' own texts from an empty completion" in screen.file.getvalue()
