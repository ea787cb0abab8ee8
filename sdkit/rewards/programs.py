"""Runs Python programs in completions against the tests of their row; a failed test becomes feedback.

`sandbox` runs the programs, `program_tests` reads the tests.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Row
from sdkit.language.specs import LastCodeBlock, PythonTests
from sdkit.rewards.answers import extract
from sdkit.rewards.program_tests import Test, read_tests
from sdkit.rewards.sandbox import Outcome, Sandbox
from sdkit.rewards.scorer import ScoredCompletion, Scorer, score_in_threads

SHOWN = 250
"""Maximum characters shown of an input or output."""


def python_tests(reward: PythonTests) -> Scorer:
    """Scores 1 if a program passes all tests of its row, else 0; or the share of tests passed.

    Raises BadEnvironment if this machine cannot isolate programs as the reward asks; the scorer raises BadData if a
    row has no valid tests.
    """
    sandbox = Sandbox(reward)

    def score(completion: str, row: Row) -> ScoredCompletion:
        tests = read_tests(row, reward.tests)
        program = extract(reward.extract, completion)
        if program is None:
            missing = "There is no program in the answer."
            if isinstance(reward.extract, LastCodeBlock):
                missing = "There is no program: the answer has no complete code block between lines of ```."
            return ScoredCompletion(reward=0.0, feedback=missing)
        return _run_tests(program, tests, reward, sandbox)

    score_all = functools.partial(score_in_threads, score, threads=reward.at_once)
    return Scorer(score_all, check_row=lambda row: read_tests(row, reward.tests))


def _run_tests(program: str, tests: Sequence[Test], reward: PythonTests, sandbox: Sandbox) -> ScoredCompletion:
    """Runs the tests in order; with `credit: all`, stops at the first that fails."""
    end = time.monotonic() + reward.total_seconds
    passed, feedback = 0, None
    with sandbox.open_jail(program, reward.total_seconds) as jail:
        for number, test in enumerate(tests, 1):
            remaining = min(reward.seconds, end - time.monotonic())
            late = Outcome(failure=f"All tests together took more than {reward.total_seconds:g} s.")
            outcome = jail.run_test(test, remaining) if remaining > 0 else late
            if outcome.failure is None and test.passed(outcome.result):
                passed += 1
                continue
            if feedback is None:
                text = f"Test {number} of {len(tests)} failed.\n\n{_describe(test, outcome)}"
                feedback = _truncate(text, reward.feedback_characters)
            if reward.credit == "all" or remaining <= 0:
                break
    share = passed / len(tests)
    return ScoredCompletion(reward=share if reward.credit == "share" else float(share == 1), feedback=feedback)


def _describe(test: Test, outcome: Outcome) -> str:
    """The input, the actual result and the expected one."""
    parts = []
    if test.kind != "asserts":
        parts.append(_section("Input", _input_text(test)))
    if outcome.failure:
        parts.append(outcome.stderr.strip() or outcome.failure)
    else:
        parts.append(_section("Output", _result_text(test, outcome.result)))
    if test.kind != "asserts":
        parts.append(_section("Expected", _result_text(test, test.expected)))
    return "\n\n".join(parts)


def _input_text(test: Test) -> str:
    if test.kind == "stdin":
        return _truncate(test.input, SHOWN)
    if isinstance(test.input, Mapping):
        arguments = [f"{name}={json.dumps(value)}" for name, value in test.input.items()]
    else:
        arguments = [json.dumps(value) for value in test.input]
    return _truncate(f"{test.function}({', '.join(arguments)})", SHOWN)


def _result_text(test: Test, value: Any) -> str:
    try:
        return _truncate(value.strip() if test.kind == "stdin" else json.dumps(value), SHOWN)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _section(title: str, text: str) -> str:
    return f"{title}:\n{text or '(nothing)'}"


def _truncate(text: str, limit: int) -> str:
    """Cuts a text to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
