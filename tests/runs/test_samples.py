"""Samples as Markdown: headings with scores, and texts that cannot break out of their blocks."""

from sdkit.runs.samples import as_markdown


def test_sample_of_a_step():
    record = {
        "row": 3,
        "prompt": "1 + 1?",
        "teacher_prompt": None,
        "completion": "2",
        "finished": False,
        "rewards": {"right": 1.0},
    }
    assert as_markdown("samples of step 1", [record]) == (
        "# samples of step 1\n\n"
        "## row 3, cut at the length limit, right 1\n\n"
        "prompt:\n\n```text\n1 + 1?\n```\n\n"
        "completion:\n\n```text\n2\n```\n"
    )


def test_completion_of_an_evaluation():
    record = {
        "suite": "sums",
        "decoding": "greedy",
        "row": 0,
        "prompt": "p",
        "completion": "c",
        "scores": {"right": 0.5},
    }
    assert "## sums, greedy, row 0, right 0.5\n" in as_markdown("completions", [record])


def test_turn_with_a_teacher_prompt_of_its_own():
    turns = [
        {"turn": 0, "role": "assistant", "text": "3", "teacher_prompt": "1 + 1? Not 3."},
        {"turn": 0, "role": "user", "text": "No."},
        {"turn": 1, "role": "assistant", "text": "2"},
    ]
    page = as_markdown("x", [{"row": 0, "completion": "3No.2", "turns": turns}])
    assert page.partition("row 0\n\n")[2] == (
        "turn 0, assistant, teacher's prompt:\n\n```text\n1 + 1? Not 3.\n```\n\n"
        "turn 0, assistant:\n\n```text\n3\n```\n\n"
        "turn 0, user:\n\n```text\nNo.\n```\n\n"
        "turn 1, assistant:\n\n```text\n2\n```\n"
    )


def test_backticks_in_a_text_stay_in_its_block():
    page = as_markdown("x", [{"row": 0, "completion": "```python\nprint()\n```"}])
    assert "````text\n```python\nprint()\n```\n````" in page
