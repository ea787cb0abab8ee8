"""specs/retry: the reward of the worked line, and what it says of a wrong one."""

import runpy
from pathlib import Path

import pytest

REWARD = Path(__file__).parents[2] / "specs" / "retry" / "worked_line.py"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("7 + 9 = 16", (1.0, None)),
        (" 7 + 9 = 16\n", (1.0, None)),
        ("7 + 9 = 15", (0.0, "That is not right. The last digit of the result is 6.")),
        ("16", (0.0, "That is not right. The last digit of the result is 6.")),
    ],
)
def test_worked_line_is_right_to_the_last_token(completion, expected):
    worked_line = runpy.run_path(str(REWARD))["worked_line"]
    assert worked_line(completion, {"demonstration": "7 + 9 = 16"}) == expected
