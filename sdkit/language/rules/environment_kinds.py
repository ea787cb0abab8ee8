"""Environments of other packages and servers, and environments by row."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import Path, did_you_mean, listed, outside, shorten, spelled
from sdkit.language.rules.base import Context, Finding, at_user_file, columns_of, data_of, run_rule
from sdkit.language.rules.prompts import template_faults
from sdkit.language.rules.served import address_faults
from sdkit.language.tasksets import players
from sdkit.language.templates import TemplateError, fields, parse
from sdkit.language.user_functions import file_fault_of

OBSERVATION_FIELDS = {"gymnasium": ["observation", "render"], "openenv": ["observation"]}
UNPARSABLE_FIELDS = {"gymnasium": ["actions"], "openenv": ["actions", "error"]}


@run_rule("a routed environment's column is in the data")
def environment_route(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The column names each row's environment, in the training rows and in every suite of the task.  Its values are
    compared with the routes when the data is read.
    """
    if not isinstance(spec.environment, specs.RoutedEnvironment):
        return
    yield from _unmapped(spec, ("environment", "by"), spec.environment.by)


def _unmapped(spec: specs.ExperimentSpec, where: Path, name: str) -> Iterator[Finding]:
    """A finding for a column that the training data, or a suite of the task, do not map."""
    suites = [(("evaluation", "suites", suite, "data"), each.data) for suite, each in spec.suites.items()]
    for path, data in [(("data",), spec.data), *suites]:
        known = columns_of(spec, data)
        if name not in known:
            of = "" if path == ("data",) else f" for {spelled(path)}"
            hint = did_you_mean(name, known) or f"add {spelled(path)}.columns.{name}"
            yield where, f"column {shorten(name)} {outside(known)}{of}", hint
            return


@run_rule("what an environment's reset gets is in the data")
def environment_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`columns` and `seed_column` name columns of the rows."""
    for path, environment in specs.environments_of(spec.environment, specs.SteppedEnvironment):
        named: list[tuple[Path, str]] = [
            ((*path, "columns", place), name) for place, name in enumerate(environment.columns)
        ]
        if environment.seed_column:
            named.append(((*path, "seed_column"), environment.seed_column))
        for where, name in named:
            yield from _unmapped(spec, where, name)


@run_rule("a verifiers environment has the keys or numbers of its tasks, and an interpreter")
def environment_task(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The column gives each row's task; `python` is a file that can be run."""
    for path, environment in specs.environments_of(spec.environment, specs.VerifiersEnvironment):
        yield from _unmapped(spec, (*path, "task_column"), environment.task_column)
        if environment.python and not os.access(context.file(environment.python), os.X_OK):
            where = (*path, "python")
            yield where, f"{environment.python} cannot be run", context.start_of(where, environment.python)


@run_rule("rows that are tasks are those that the environment plays")
def data_taskset(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A source of kind verifiers and the environment name one taskset.  What both state agrees; what the source leaves out is
    the environment's.
    """
    known = [environment.id for _, environment in specs.environments_of(spec.environment, specs.VerifiersEnvironment)]
    for data_path, data in data_of(spec):
        source, path = data.source, (*data_path, "source")
        if not isinstance(source, specs.VerifiersSource):
            continue
        if source.python and not os.access(context.file(source.python), os.X_OK):
            where = (*path, "python")
            yield where, f"{source.python} cannot be run", context.start_of(where, source.python)
        own = list(players(source, spec.environment))
        if not known and source.id is None:
            yield path, "the source names no taskset, and no environment of kind verifiers does", "add id: NAME"
        elif known and not own:
            hint = did_you_mean(source.id or "", known) or "leave id out"
            yield (*path, "id"), f"id is {shorten(source.id)}, but the environment plays {listed(known)}", hint
        elif len(own) > 1:
            message = f"{listed(spelled(player) for player, _ in own)} may all play the tasks"
            hint = None if source.id else "name the taskset: id"
            yield path, message, hint
        elif own:
            yield from _disagreements(path, source, *own[0])


def _disagreements(
    path: Path, source: specs.VerifiersSource, at: Path, environment: specs.VerifiersEnvironment
) -> Iterator[Finding]:
    """Findings for what a source and its environment state differently."""
    if source.python and source.python != environment.python:
        theirs = f"{spelled(at)}.python is {environment.python or 'not set'}"
        yield (*path, "python"), f"python is {source.python}, but {theirs}", "state it in the environment alone"
    for name, value in source.config.items():
        if environment.config.get(name, value) != value:
            theirs = f"{spelled(at)}.config.{name} is {shorten(environment.config[name])}"
            yield (*path, "config", name), f"{name} is {shorten(value)}, but {theirs}", "state it in one place"


@run_rule("an environment's observations are templates of what it gives")
def environment_template(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`{observation}` is the observation, and `{observation.key}` a part of it."""
    for path, environment in specs.environments_of(spec.environment, specs.SteppedEnvironment):
        allowed = {"observation": OBSERVATION_FIELDS, "unparsable": UNPARSABLE_FIELDS}
        for key, by_kind in allowed.items():
            text, names = getattr(environment, key), by_kind[environment.kind]
            yield from template_faults((*path, key), text, allow_keys=True)
            try:
                used = list(fields(parse(text)))
            except TemplateError:
                continue
            for field in used:
                if field.name not in names or (field.path and field.name != "observation"):
                    yield (*path, key), f"{{{field}}} {outside(names)}", did_you_mean(field.name, names)


@run_rule("the choices of an environment differ")
def environment_choices(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The place of a choice is its action, and case is ignored."""
    for path, environment in specs.environments_of(spec.environment, specs.GymnasiumEnvironment):
        first: dict[str, int] = {}
        for place, name in enumerate(environment.choices):
            if first.setdefault(name.casefold(), place) != place:
                yield (*path, "choices", place), f"choice {shorten(name)} stands twice", None


@run_rule("an environment's server has a valid address")
def environment_url(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Completions leave this machine only if the spec allows it."""
    for path, environment in specs.environments_of(spec.environment, specs.OpenEnvEnvironment):
        for message, hint in address_faults(environment.url, environment.allow_remote, "completions would go there"):
            yield (*path, "url"), message, hint


@run_rule("a file that registers an environment exists")
def environment_file(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed."""
    for path, environment in specs.environments_of(spec.environment, specs.GymnasiumEnvironment):
        if environment.file:
            fault = file_fault_of(context.file(environment.file), environment.file)
            yield from at_user_file(path, context, environment.file, fault)
