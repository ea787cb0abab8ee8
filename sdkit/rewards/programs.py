"""Python programs in completions, against the tests of their row; what failed becomes feedback.

What runs them is `rewards_sandbox`, what they are tested by `rewards_tests`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Row
from sdkit.language.specs import LastCodeBlock, PythonTests
from sdkit.rewards.answers import extract
from sdkit.rewards.program_tests import Test, read_tests
from sdkit.rewards.sandbox import Outcome, Sandbox
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer, score_in_threads

SHOWN = 250
"""Characters shown of an input or output."""


def python_tests(reward: PythonTests) -> Scorer:
    """1 where a program passes its row's tests, or the share that it passes.

    Raises BadEnvironment where this machine cannot hold programs as the reward asks; the scorer raises BadData where
    a row has no tests that can be read.
    """
    sandbox = Sandbox(reward)

    def judge(completion: str, row: Row) -> ScoredCompletion:
        tests = read_tests(row, reward.tests)
        program = extract(reward.extract, completion)
        if program is None:
            return ScoredCompletion(reward=0.0, feedback=_no_program(reward))
        return _tested(program, tests, reward, sandbox)

    def many(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        return score_in_threads(judge, pairs, threads=reward.at_once, seconds=None)

    return Scorer(many, check_row=lambda row: read_tests(row, reward.tests))


def _no_program(reward: PythonTests) -> str:
    if isinstance(reward.extract, LastCodeBlock):
        return "There is no program: the answer has no complete code block between lines of ```."
    return "There is no program in the answer."


def _tested(
    program: str, tests: Sequence[Test], reward: PythonTests, sandbox: Sandbox
) -> ScoredCompletion:
    """Run the tests in order; with credit for all or nothing no further than the first that fails."""
    end = time.monotonic() + reward.total_seconds
    passed, feedback = 0, None
    with sandbox.open_jail(program, reward.total_seconds) as jail:
        for number, test in enumerate(tests, 1):
            left = min(reward.seconds, end - time.monotonic())
            late = Outcome(failure=f"All tests together took more than {reward.total_seconds:g} s.")
            outcome = jail.run_test(test, left) if left > 0 else late
            if outcome.failure is None and test.passed(outcome.result):
                passed += 1
                continue
            if feedback is None:
                said = f"Test {number} of {len(tests)} failed.\n\n{_said(test, outcome)}"
                feedback = _cut(said, reward.feedback_characters)
            if reward.credit == "all" or left <= 0:
                break
    share = passed / len(tests)
    return ScoredCompletion(
        reward=share if reward.credit == "share" else float(share == 1), feedback=feedback
    )


# ── what failed, in words ─────────────────────────────────────────────────────────────────────


def _said(test: Test, outcome: Outcome) -> str:
    """The input, and what came of it instead of what should have."""
    parts = []
    if test.kind != "asserts":
        parts.append(_titled("Input", _given(test)))
    if outcome.failure:
        parts.append(outcome.stderr.strip() or outcome.failure)
    else:
        parts.append(_titled("Output", _shown(test, outcome.result)))
    if test.kind != "asserts":
        parts.append(_titled("Expected", _shown(test, test.expected)))
    return "\n\n".join(parts)


def _given(test: Test) -> str:
    if test.kind == "stdin":
        return _cut(test.input, SHOWN)
    if isinstance(test.input, Mapping):
        words = [f"{name}={json.dumps(value)}" for name, value in test.input.items()]
    else:
        words = [json.dumps(value) for value in test.input]
    return _cut(f"{test.function}({', '.join(words)})", SHOWN)


def _shown(test: Test, value: Any) -> str:
    try:
        return _cut(value.strip() if test.kind == "stdin" else json.dumps(value), SHOWN)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _titled(title: str, text: str) -> str:
    return f"{title}:\n{text or '(nothing)'}"


def _cut(text: str, most: int) -> str:
    """The start of a text, where it is too long."""
    return text if len(text) <= most else text[: most - 1] + "…"
