"""Programs in completions, and the tests of their rows."""

import time

import pytest

from sdkit.components import rewards_code
from sdkit.components.rewards import Judged, figures, open_reward, score
from sdkit.components.rewards_code import program_in, tidy
from sdkit.problems import BadData, BadEnvironment
from sdkit.specs import PythonTestsReward

pytestmark = pytest.mark.timeout(120)
ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
ASSERTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]
SUM = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.fixture(scope="module")
def judge():
    """Judge one completion."""
    cached = {}

    def judged(completion, row, **changes):
        key = tuple(changes.items())
        if key not in cached:
            try:
                cached[key] = open_reward(PythonTestsReward(**changes), "/", None)
            except BadEnvironment as error:
                pytest.skip(error.message)
        return cached[key](completion, row)

    return judged


# ── which program ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\ns = '''```'''\n```", "s = '''```'''\n"),
    ],
)
def test_the_last_python_block_or_the_whole_text(completion, program):
    assert program_in(completion) == program


# ── assert statements ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tests", [ASSERTS, ASSERTS.splitlines(), '["assert add(1, 2) == 3"]'])
def test_a_right_program_passes(judge, make_row, tests):
    assert judge(ADD, make_row(tests=tests)) == Judged(reward=1.0)


def test_a_wrong_program_is_told_its_line(judge, make_row):
    wrong = "def add(a, b):\n    return a - b"
    judged = judge(wrong, make_row(tests=ASSERTS))
    assert judged.reward == 0.0
    assert judged.feedback.splitlines()[0] == "Traceback (most recent call last):"
    assert judged.feedback.endswith("AssertionError")
    assert 'File "tests.py", line 1' in judged.feedback
    assert "assert add(1, 2) == 3" in judged.feedback
    assert "/" not in judged.feedback


def test_the_share_of_tests(judge, make_row):
    half = "def add(a, b):\n    return 3"
    row = make_row(tests=ASSERTS.splitlines())
    judged = judge(half, row, full_marks_only=False)
    assert judged.reward == 0.5
    assert judged.feedback.startswith("1 of 2 tests passed.\nTraceback")
    assert judge(half, row).reward == 0.0


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("def add(a, b)\n    return 1", "SyntaxError: expected ':'"),
        ("", "NameError: name 'add' is not defined"),
        ("I would add them.", "SyntaxError"),
        ("def add(a, b):\n    return helper(a)\ndef helper(a):\n    return {}[a]", "KeyError: 1"),
        ("def add(a, b):\n    return add(a, b)", "RecursionError"),
        ("def add(a, b):\n    return [0] * 10**12", "MemoryError"),
        ("raise SystemExit", "SystemExit"),
        ("import os\nos._exit(0)", "ended before its tests did, with exit code 0"),
        ('import os\nos.write(3, b\'{"passed": 2, "error": null}\')\nos._exit(0)', "ended before"),
        ("print('x' * 10**6)", "The program was stopped: it printed more than 64 KiB."),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("\0", "null bytes"),
        ("\ud800", "UnicodeEncodeError"),
    ],
)
def test_a_program_that_fails_is_worth_nothing_and_told_why(judge, make_row, program, says):
    judged = judge(program, make_row(tests=ASSERTS), seconds=20)
    assert judged.reward == 0.0
    assert says in judged.feedback
    assert len(judged.feedback) < 2000


def test_an_endless_program_is_worth_nothing(judge, make_row):
    started = time.monotonic()
    judged = judge("def add(a, b):\n    while True: pass", make_row(tests=ASSERTS), seconds=1)
    assert judged == Judged(reward=0.0, feedback="The program was stopped: it took more than 1 s.")
    assert time.monotonic() - started < 10


def test_dataclasses_and_main_guards_work(judge, make_row):
    program = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    x: int
def add(a, b):
    return P(a + b).x
if __name__ == "__main__":
    print(input())
"""
    assert judge(program, make_row(tests=ASSERTS)).reward == 1.0


# ── input and output ──────────────────────────────────────────────────────────────────────────


def test_printed_output_is_compared_word_by_word(judge, make_row):
    row = make_row(tests=CASES)
    assert judge(SUM, row) == Judged(reward=1.0)
    assert judge(SUM.replace("a + b", "f' {a + b} '"), row).reward == 1.0
    judged = judge(SUM.replace("a + b", "a * b"), row)
    assert judged == Judged(reward=0.0, feedback="Input:\n1 2\nExpected output:\n3\nPrinted:\n2")


def test_the_share_of_cases(judge, make_row):
    judged = judge("input()\nprint(10)", make_row(tests=CASES), full_marks_only=False)
    assert judged.reward == 0.5
    assert judged.feedback.startswith("1 of 2 tests passed.\nInput:\n1 2\n")


def test_an_exception_is_shown_without_folders(judge, make_row):
    judged = judge(
        "import json\njson.loads(input())", make_row(tests=[{"input": "{", "output": ""}])
    )
    assert judged.reward == 0.0
    assert 'File "program.py", line 2, in <module>' in judged.feedback
    assert 'File "decoder.py"' in judged.feedback
    assert "/" not in judged.feedback.replace("Input:", "")


def test_time_is_for_all_cases_together(judge, make_row):
    started = time.monotonic()
    tests = [{"input": "", "output": ""}] * 50
    judged = judge("import time; time.sleep(0.5)", make_row(tests=tests), seconds=2)
    assert judged.reward == 0.0
    assert judged.feedback.startswith("The program took more than 2 s.")
    assert time.monotonic() - started < 12


# ── rows, machines ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tests", [None, "", [], [1], [{"input": "1"}], ["assert x", 3], "[]", {}])
def test_a_row_needs_tests(judge, make_row, tests):
    with pytest.raises(BadData, match="row 5 has no tests in the column 'tests'"):
        judge(ADD, make_row(index=5, tests=tests))


def test_many_completions_at_once(make_row):
    try:
        scorer = open_reward(PythonTestsReward(tests="checks"), "/", None)
    except BadEnvironment as error:
        pytest.skip(error.message)
    rows = [make_row(checks=f"assert f() == {i}") for i in range(8)]
    texts = [f"def f(): return {i - i % 2}" for i in range(8)]
    found = figures(score({"code": scorer}, texts, rows))
    assert found == {"code": [1.0, 0.0] * 4}


def test_without_a_sandbox_only_the_spec_can_allow_it(monkeypatch):
    refused = {"all": "unshare: not permitted", "all but network": "the same", "limits only": None}
    monkeypatch.setattr(rewards_code, "refusal", refused.get)
    with pytest.raises(BadEnvironment, match=r"no sandbox .*: unshare: not permitted") as caught:
        open_reward(PythonTestsReward(), "/", None)
    assert "network: allowed" in caught.value.hint
    assert rewards_code._walls(PythonTestsReward(network="allowed")) == "limits only"
    refused["limits only"] = "no interpreter"
    with pytest.raises(BadEnvironment, match="no interpreter"):
        open_reward(PythonTestsReward(network="allowed"), "/", None)


def test_errors_are_cut_to_their_last_lines():
    error = "\n".join(f"line {i}" for i in range(100)) + '\n  File "/root/x/y.py", line 3'
    lines = tidy(error).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (20, "line 81", '  File "y.py", line 3')
    assert len(tidy("x" * 10_000)) == 1500
