"""Completions that are programs, run against the tests of their row.  Knows nothing of how a sandbox is built."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from sdkit.batches import Row
from sdkit.components.rewards_judged import Judged, Pair, Scorer, in_threads
from sdkit.components.rewards_sandbox import BOX, Ended, Limits, Refused, Walls, refusal, run
from sdkit.problems import BadData, BadEnvironment, counted
from sdkit.specs import PythonTestsReward

AT_ONCE = os.cpu_count() or 1
LINES, CHARACTERS, VALUE = 20, 1500, 300  # of an error, and of a value in it

_BLOCK = re.compile(r"```[ \t]*(python|py|)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.I | re.M | re.S)
_FOLDERS = re.compile(r'(File ")/[^"]*?([^"/]+")')

# Runs a program and then asserts in its names.  A program that ends early never reaches the report; the token keeps
# one from writing the report itself.  Both share a process, so this stops accidents and lazy cheats, not a determined one.
HARNESS = r"""
import json, linecache, os, sys, traceback, types

def main():
    job = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.modules["solution"] = types.ModuleType("solution")  # dataclasses look their module up
    names = vars(sys.modules["solution"])
    error = attempt(job["program"], "solution.py", names)
    passed, errors = 0, [error] if error else []
    for test in [] if error else job["tests"]:
        error = attempt(test, "tests.py", names)
        passed += error is None
        errors += [error] if error else []
    report = {"token": job["token"], "passed": passed, "error": errors[0] if errors else None}
    os.write(3, json.dumps(report).encode())
    os._exit(0)

def attempt(text, name, names):
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    try:
        exec(compile(text, name, "exec"), names)
    except BaseException as error:
        steps = error.__traceback__
        while steps and steps.tb_frame.f_code.co_filename not in ("solution.py", "tests.py"):
            steps = steps.tb_next
        return "".join(traceback.format_exception(error.with_traceback(steps), limit=-8, chain=False))[-4000:]

main()
"""


@frozen
class Case:
    """A test that gives a program its input and looks at what it prints."""

    given: str
    wanted: str


def python_tests(reward: PythonTestsReward) -> Scorer:
    """The share of a row's tests that the completion's program passes.

    Raises BadEnvironment where this machine allows no sandbox as strict as the spec asks; the scorer raises BadData
    where a row has no tests.
    """
    walls = _walls(reward)
    limits = Limits(seconds=reward.seconds, memory_mib=reward.memory_mib)

    def judge(completion: str, row: Row) -> Judged:
        asserts, cases = read_tests(row, reward.tests)
        program = program_in(completion)
        try:
            if cases:
                judged = _run_cases(program, cases, limits, walls, reward.full_marks_only)
            else:
                judged = _run_asserts(program, asserts, limits, walls)
        except Refused as error:
            raise BadEnvironment(f"the sandbox cannot be built any more: {error}") from error
        if reward.full_marks_only and judged.reward < 1:
            return Judged(reward=0.0, feedback=judged.feedback)
        return judged

    def many(pairs: Sequence[Pair]) -> list[Judged]:
        return in_threads(judge, pairs, threads=AT_ONCE, seconds=None)

    return Scorer(many)


def _walls(reward: PythonTestsReward) -> Walls:
    """The strictest sandbox that the spec asks for and the machine allows."""
    walls: Walls = "all" if reward.network == "none" else "all but network"
    reason = refusal(walls)
    if reason is None:
        return walls
    if reward.network == "none":
        raise BadEnvironment(
            f"this machine allows no sandbox for rewards of kind python_tests: {reason}",
            hint="network: allowed runs the programs without one, under limits of time and memory only",
        )
    reason = refusal("limits only")
    if reason is None:
        return "limits only"
    raise BadEnvironment(f"programs cannot be run under limits on this machine: {reason}")


def program_in(completion: str) -> str:
    """The last ```python block, else the last block without a language, else the whole text."""
    blocks: list[tuple[str, str]] = _BLOCK.findall(completion)
    named = [text for language, text in blocks if language] or [text for _, text in blocks]
    return named[-1] if named else completion


def read_tests(row: Row, column: str) -> tuple[list[str], list[Case]]:
    """The tests of a row, of which one list is empty: texts of assert statements, and cases.

    The column has one text, a list of texts or a list of {input, output}; a list may be written as JSON.  Raises BadData where the column has something else, or nothing.
    """
    value = row.columns.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # assert statements may begin with a bracket too
            value = json.loads(value)
    tests: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if tests and all(isinstance(test, str) and test.strip() for test in tests):
        return tests, []
    cases = [Case(str(t["input"]), str(t["output"])) for t in tests if _is_case(t)]
    if not cases or len(cases) < len(tests):
        raise BadData(
            f"row {row.index} has no tests in the column '{column}'",
            hint="tests are assert statements as text, a list of such texts, or a list of {input, output}",
        )
    return [], cases


def _is_case(test: Any) -> bool:
    return hasattr(test, "keys") and {"input", "output"} <= set(test.keys())


# ── running them ──────────────────────────────────────────────────────────────────────────────


def _run_asserts(program: str, tests: list[str], limits: Limits, walls: Walls) -> Judged:
    """All in one process: every test sees the program's names, and those of the tests before it."""
    token = secrets.token_hex()
    job = json.dumps({"program": program, "tests": tests, "token": token})
    ended = run(HARNESS, limits, walls, stdin=job)
    try:
        report = json.loads(ended.report)
        passed, error = int(report["passed"]), report["error"] or ""
        honest = report["token"] == token
    except (ValueError, TypeError, KeyError):
        passed, error, honest = 0, "", False
    if ended.stopped or not honest:
        return Judged(reward=0.0, feedback=_why_it_ended(ended))
    return _share(passed, len(tests), error)


def _run_cases(
    program: str, cases: list[Case], limits: Limits, walls: Walls, all_or_nothing: bool
) -> Judged:
    """A process a case; the limit on time is for all of them together."""
    until = time.monotonic() + limits.seconds
    passed, error = 0, ""
    for case in cases:
        left = max(until - time.monotonic(), 0.01)
        ended = run(
            program,
            Limits(seconds=left, memory_mib=limits.memory_mib),
            walls,
            stdin=case.given,
            output_extra=len(case.wanted.encode()),
        )
        if ended.late:
            late = f"The program took more than {limits.seconds:g} s.\nInput:\n{_cut(case.given)}"
            return Judged(reward=0.0, feedback=late)
        found = _case_error(case, ended)
        passed += found is None
        error = error or found or ""
        if error and all_or_nothing:
            return Judged(reward=0.0, feedback=error)
    return _share(passed, len(cases), error)


def _case_error(case: Case, ended: Ended) -> str | None:
    given = f"Input:\n{_cut(case.given)}"
    if ended.stopped or ended.exit_code:
        return f"{_why_it_ended(ended)}\n{given}"
    if _lines(ended.stdout) == _lines(case.wanted):
        return None
    return f"{given}\nExpected output:\n{_cut(case.wanted)}\nPrinted:\n{_cut(ended.stdout)}"


def _lines(text: str) -> list[list[str]]:
    """What counts of an output: the words of each line."""
    return [line.split() for line in text.strip().splitlines()]


# ── what the program's author is told ─────────────────────────────────────────────────────────


def _share(passed: int, total: int, error: str) -> Judged:
    if passed == total:
        return Judged(reward=1.0)
    counts = f"{passed} of {counted(total, 'test')} passed.\n" if total > 1 else ""
    return Judged(reward=passed / total, feedback=counts + tidy(error))


def _why_it_ended(ended: Ended) -> str:
    said = tidy(ended.stderr)
    if ended.stopped:
        return f"The program was stopped: {ended.stopped}." + (f"\n{said}" if said else "")
    return said or f"The program ended before its tests did, with exit code {ended.exit_code}."


def tidy(error: str) -> str:
    """The last lines of an error, without the folders of this machine."""
    text = _FOLDERS.sub(r"\1\2", error).replace(f"{BOX}/", "")
    return "\n".join(text.strip().splitlines()[-LINES:])[-CHARACTERS:]


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= VALUE else text[: VALUE - 1] + "…"
