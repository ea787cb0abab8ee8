"""Rules on rewards and on the suites that use them."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator

from sdkit.problems import outside, shorten
from sdkit.rules.base import Context, Finding, columns_of, did_you_mean, run_rule
from sdkit.specs import (
    ChoiceReward,
    ExactReward,
    ExperimentSpec,
    FileReward,
    NumberReward,
    ReasoningGymReward,
    ReasoningGymSource,
    RegexReward,
    Suite,
)


def _suites(spec: ExperimentSpec) -> Iterator[tuple[str, Suite]]:
    yield from spec.evaluation.suites.items() if spec.evaluation else ()


@run_rule("suites name rewards that exist")
def unknown_reward(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Scores are declared under `rewards` and used by name."""
    known = list(spec.rewards)
    for suite_name, suite in _suites(spec):
        path = ("evaluation", "suites", suite_name)
        used = [((*path, "score"), suite.score)]
        used += [((*path, "also", i), name) for i, name in enumerate(suite.also)]
        for where, name in used:
            if name not in known:
                what = outside(known) if known else "is not declared: there are no rewards"
                hint = did_you_mean(name, known) or f"add rewards.{name}"
                yield where, f"reward {shorten(name)} {what}", hint


def _users(spec: ExperimentSpec, reward: str) -> Iterator[tuple[str, Suite]]:
    for name, suite in _suites(spec):
        if reward in (suite.score, *suite.also):
            yield name, suite


@run_rule("the task's own scorer scores the task's own rows")
def reasoning_gym_reward(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The scorer of reasoning-gym needs the entry that the task generated."""
    for name, reward in spec.rewards.items():
        if isinstance(reward, ReasoningGymReward):
            for suite_name, suite in _users(spec, name):
                if not isinstance(suite.data.source, ReasoningGymSource):
                    message = f"reward {shorten(name)} scores reasoning_gym rows, but suite {shorten(suite_name)} has {suite.data.source.kind}"
                    hint = "use a reward of kind exact, number or choice"
                    yield ("evaluation", "suites", suite_name, "score"), message, hint


@run_rule("right answers are in the columns of the suites")
def answer_column(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A reward that compares with a column needs it in every suite that it scores."""
    for name, reward in spec.rewards.items():
        if isinstance(reward, ExactReward | NumberReward | ChoiceReward):
            for suite_name, suite in _users(spec, name):
                known = columns_of(spec, suite.data)
                if known and reward.answer not in known:
                    said = context.stated(("rewards", name, "answer"), reward.answer)
                    message = f"{said}, which {outside(known)}, the columns of suite {shorten(suite_name)}"
                    yield ("rewards", name, "answer"), message, did_you_mean(reward.answer, known)


@run_rule("patterns can be read")
def pattern(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A pattern is a Python regular expression."""
    for name, reward in spec.rewards.items():
        if isinstance(reward, RegexReward):
            try:
                re.compile(reward.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield ("rewards", name, "pattern"), f"not a regular expression: {error}", None


@run_rule("the user's reward functions are there")
def reward_file(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The file is read and parsed, never run: it must define the function at its top level, to be
    called with a completion and a row.
    """
    for name, reward in spec.rewards.items():
        if isinstance(reward, FileReward):
            yield from _check_file(name, reward, context)


def _check_file(name: str, reward: FileReward, context: Context) -> Iterator[Finding]:
    file, function = ("rewards", name, "file"), ("rewards", name, "function")
    try:
        with open(context.file(reward.file), "rb") as handle:
            tree = ast.parse(handle.read())
    except OSError:
        what = "is a folder" if os.path.isdir(context.file(reward.file)) else "does not exist"
        yield file, f"file {reward.file} {what}", "paths start at the spec's folder"
        return
    except SyntaxError as error:
        yield file, f"{reward.file}:{error.lineno or 1}: {error.msg}", None
        return
    except (ValueError, RecursionError):
        yield file, f"{reward.file} is not Python", None
        return
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    if reward.function not in defined:
        message = f"{reward.file} defines no function {shorten(reward.function)} at its top level"
        yield function, message, did_you_mean(reward.function, defined)
        return
    found = defined[reward.function]
    count = len(found.args.posonlyargs) + len(found.args.args)
    required = count - len(found.args.defaults)
    named_only = [d for d in found.args.kw_defaults if d is None]
    if (count < 2 and not found.args.vararg) or required > 2 or named_only:
        message = f"{reward.file}:{found.lineno}: {reward.function} must take (completion, row)"
        yield function, message, None


RULES = (unknown_reward, reasoning_gym_reward, answer_column, pattern, reward_file)
