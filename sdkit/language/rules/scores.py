"""Rewards, and the suites that use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdkit.language import specs
from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import did_you_mean, outside, shorten
from sdkit.language.files import file_names
from sdkit.language.python_imports import modules_beside
from sdkit.language.rules.base import (
    ADAPTER_CONFIG,
    IS_ADAPTER,
    Context,
    Finding,
    T,
    columns_of,
    pattern_fault,
    run_rule,
    uncallable,
)


@run_rule("suites use declared rewards")
def unknown_reward(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A suite refers to its rewards, declared under `rewards`, by name."""
    known = list(spec.rewards)
    for path, _, suite in spec.placed_suites():
        named = [((*path, "score"), suite.score)]
        named += [((*path, "also", i), name) for i, name in enumerate(suite.also)]
        for where, name in named:
            if name not in known:
                fault = outside(known) if known else "is not declared: there are no rewards"
                declare = f"declare it under rewards, such as rewards: {{{name}: exact}}"
                yield where, f"reward {shorten(name)} {fault}", did_you_mean(name, known) or declare


def _rewards(spec: specs.ExperimentSpec, kind: type[T]) -> list[tuple[str, T]]:
    """The rewards of a class, by name."""
    return [(name, reward) for name, reward in spec.rewards.items() if isinstance(reward, kind)]


def _users(spec: specs.ExperimentSpec) -> dict[str, list[tuple[SpecPath, str, specs.HeldOutPrompts]]]:
    """The suites that use each reward, directly or as part of a weighted sum, each with its path and its name."""
    reached = {name: _with_parts(spec, name) for name in spec.rewards}
    users: dict[str, list[tuple[SpecPath, str, specs.HeldOutPrompts]]] = {name: [] for name in spec.rewards}
    for path, name, suite in spec.placed_suites():
        scores = [reached[used] for used in {suite.score, *suite.also} if used in reached]
        for reward in users.keys() & set().union(*scores):
            users[reward].append((path, name, suite))
    return users


def _with_parts(spec: specs.ExperimentSpec, name: str) -> set[str]:
    """A reward and all parts of its sum, at any depth."""
    names, pending = set(), [name]
    while pending:
        current = pending.pop()
        if current not in names:
            names.add(current)
            pending += _parts(spec, current)
    return names


def _parts(spec: specs.ExperimentSpec, name: str) -> Iterator[str]:
    reward = spec.rewards.get(name)
    yield from reward.parts if isinstance(reward, specs.WeightedReward) else ()


@run_rule("a reasoning_gym reward scores reasoning_gym rows")
def reasoning_gym_reward(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """reasoning-gym's scorer needs the entry that its task generated."""
    users = _users(spec)
    for name, _ in _rewards(spec, specs.ReasoningGymReward):
        for path, suite_name, suite in users[name]:
            if not isinstance(suite.data.source, specs.ReasoningGymSource):
                message = f"reward {shorten(name)} scores reasoning_gym rows, but suite {shorten(suite_name)} has {suite.data.source.kind}"
                hint = "use a reward of kind exact, number or choice"
                yield (*path, "score"), message, hint


@run_rule("suites have the columns that their rewards read")
def answer_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A reward that reads an answer or tests from a column needs it in every suite that uses the reward."""
    users = _users(spec)
    for name, reward in spec.rewards.items():
        column = specs.column_of(reward)
        for _, suite_name, suite in users[name] if column else ():
            known = columns_of(spec, suite.data)
            if column and known and column not in known:
                keys = {specs.PythonTests: "tests", specs.InstructionChecks: "checks"}
                path = ("rewards", name, keys.get(type(reward), "answer"))
                setting = context.stated(path, column)
                message = f"{setting}, which {outside(known)}, the columns of suite {shorten(suite_name)}"
                yield path, message, did_you_mean(column, known)


@run_rule("the parts of a weighted reward are declared rewards")
def unknown_part(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A weighted reward refers to other rewards by name."""
    for name, reward in _rewards(spec, specs.WeightedReward):
        known = [other for other in spec.rewards if other != name]
        for part in reward.parts:
            if part not in spec.rewards:
                hint = did_you_mean(part, known) or f"add rewards.{part}"
                yield ("rewards", name, "parts", part), f"reward {shorten(part)} {outside(known)}", hint


@run_rule("no weighted reward contains itself")
def part_of_itself(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Nested sums must end in rewards that score the completion."""
    with_parts = {name: _with_parts(spec, name) for name in spec.rewards}
    for name in spec.rewards:
        for part in _parts(spec, name):
            if name in with_parts.get(part, ()):
                through = "" if part == name else f" through {shorten(part)}"
                yield ("rewards", name, "parts", part), f"reward {shorten(name)} is a part of itself{through}", None


@run_rule("a weighted reward has a nonzero weight")
def zero_weights(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """If all weights are 0, every completion gets the same reward."""
    for name, reward in _rewards(spec, specs.WeightedReward):
        if not any(reward.parts.values()):
            yield ("rewards", name, "parts"), f"all weights of {shorten(name)} are 0", None


@run_rule("the time limit of one test is at most the total")
def test_seconds(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A completion's tests share `total_seconds`, so a longer `seconds` could never take effect."""
    for name, reward in _rewards(spec, specs.PythonTests):
        if reward.seconds > reward.total_seconds:
            path = ("rewards", name)
            total = context.stated((*path, "total_seconds"), reward.total_seconds)
            one = context.stated((*path, "seconds"), reward.seconds)
            written = context.loaded.written((*path, "seconds"))
            yield (*path, "seconds" if written else "total_seconds"), f"{one}, but {total}", None


@run_rule("a reward model is a local model folder")
def reward_model_folder(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The folder has a config.json and safetensors weights; other formats can run code when loaded."""
    for name, reward in _rewards(spec, specs.RewardModel):
        path = ("rewards", name, "path")
        folder = context.file(reward.path)
        if not os.path.isdir(folder):
            yield path, f"there is no folder {reward.path}", context.start_of(path, reward.path)
        elif os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
            yield path, f"{reward.path} {IS_ADAPTER}", "merge it into its base model first"
        elif not os.path.isfile(os.path.join(folder, "config.json")):
            yield path, f"{reward.path} has no config.json", None
        elif not any(file.endswith(".safetensors") for file in file_names(folder)):
            yield path, f"{reward.path} has no weights in safetensors files", None


@run_rule("patterns are valid regular expressions")
def pattern(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A pattern uses the syntax of Python's `re` module."""
    rewards: list[tuple[SpecPath, Any]] = [(("rewards", name), reward) for name, reward in spec.rewards.items()]
    written: list[tuple[SpecPath, str]] = [
        (("rewards", name, "pattern"), reward.pattern) for name, reward in _rewards(spec, specs.RegexReward)
    ]
    for place, part in [*rewards, *specs.environments_of(spec.environment, specs.SteppedEnvironment)]:
        how = getattr(part, "extract", None)
        if isinstance(how, specs.LastMatch):
            written.append(((*place, "extract", "pattern"), how.pattern))
    for path, text in written:
        if fault := pattern_fault(text):
            yield path, fault, None


@run_rule("user-defined reward functions exist")
def reward_file(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed.  It must define the function at its top level, and the function must
    accept a completion and a row.
    """
    for name, reward in _rewards(spec, specs.FileReward):
        yield from uncallable(("rewards", name), context, reward, "completion", "row")


@run_rule("modules that files in different folders import have different names")
def same_module(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A file can import the modules beside it.  Python loads one module of a name, so if files in different folders import
    modules with the same name, all of them get the first.
    """
    first: dict[str, str] = {}
    for where, file in spec.user_files():
        for name in sorted(modules_beside(Path(context.file(file)))):
            other = first.setdefault(name, file)
            if not os.path.samefile(os.path.dirname(context.file(other)), os.path.dirname(context.file(file))):
                message = f"{file} and {other} each import a module {name} beside them, but Python loads only one"
                yield where, message, "rename one of the two modules"
