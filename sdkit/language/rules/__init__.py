"""Every rule of the language: checks across fields, one function per rule."""

from __future__ import annotations

from itertools import islice

from sdkit.language.errors import MAX_SHOWN_PROBLEMS, Problem
from sdkit.language.overlay import LoadedSpec
from sdkit.language.rules import (
    data,
    engines,
    environment_kinds,
    environments,
    kinds,
    learning,
    losses,
    names,
    output,
    panel,
    policy,
    prompts,
    rollouts,
    scores,
    served,
    servers,
    teachers,
    tokens,
    training,
    writers,
)
from sdkit.language.rules.base import Context, Rule
from sdkit.language.specs import ExperimentSpec, MethodSpec

_MODULES = (
    losses,
    learning,
    policy,
    tokens,
    rollouts,
    teachers,
    served,
    servers,
    engines,
    environments,
    environment_kinds,
    prompts,
    writers,
    data,
    scores,
    panel,
    names,
    kinds,
    training,
    output,
)
RULES = tuple(rule for module in _MODULES for rule in vars(module).values() if isinstance(rule, Rule))
"""The rules, module by module, in the order in which they are written."""


def check(spec: MethodSpec | ExperimentSpec, loaded: LoadedSpec) -> list[Problem]:
    """All rules over one spec; of each the first findings, more than are shown."""
    context = Context(loaded)
    is_run = isinstance(spec, ExperimentSpec)
    return [
        Problem(path, message, rule.code, hint, loaded.place(path), rule.severity)
        for rule in RULES
        if is_run or not rule.runs_only
        for path, message, hint in islice(rule.check(spec, context), MAX_SHOWN_PROBLEMS)
    ]
