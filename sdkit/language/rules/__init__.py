"""Every rule of the language: checks across fields, one function per rule."""

from __future__ import annotations

from itertools import islice

from sdkit.language.errors import MOST_SHOWN, Problem
from sdkit.language.overlay import Loaded
from sdkit.language.rules import (
    data,
    learning,
    losses,
    names,
    policy,
    prompts,
    rollouts,
    scores,
    served,
    servers,
    teachers,
    tokens,
    training,
)
from sdkit.language.rules.base import Context, Rule
from sdkit.language.specs import ExperimentSpec, MethodSpec

RULES: tuple[Rule, ...] = (
    *losses.RULES,
    *learning.RULES,
    *policy.RULES,
    *tokens.RULES,
    *rollouts.RULES,
    *teachers.RULES,
    *served.RULES,
    *servers.RULES,
    *prompts.RULES,
    *data.RULES,
    *scores.RULES,
    *names.RULES,
    *training.RULES,
)


def check(spec: MethodSpec | ExperimentSpec, loaded: Loaded) -> list[Problem]:
    """The problems that all rules find in a spec; at most MOST_SHOWN per rule."""
    context = Context(loaded)
    is_run = isinstance(spec, ExperimentSpec)
    return [
        Problem(path, message, rule.code, hint, loaded.place(path), rule.severity)
        for rule in RULES
        if is_run or not rule.runs_only
        for path, message, hint in islice(rule.check(spec, context), MOST_SHOWN)
    ]
