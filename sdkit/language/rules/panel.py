"""The panel of an evaluation: suites that measure what training must not lose."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sdkit.language import panel
from sdkit.language.errors import shorten
from sdkit.language.rules.base import Context, Finding, not_plain, run_rule
from sdkit.language.specs import ExperimentSpec, LmEvalTasks, PanelSuite, ReasoningSuites, entry_name

PACKAGES = {ReasoningSuites: ("reasoning_gym", "sdkit[demo]"), LmEvalTasks: ("lm_eval", "sdkit[lm-eval]")}
"""The package that an entry needs, and the extra that installs it."""


@run_rule("every suite of the panel has a name of its own")
def panel_name(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Names of suites appear in metric names and tables.  An entry without a name has that of its kind."""
    taken = {name: f"evaluation.suites.{name}" for name in spec.suites}
    for path, entry in spec.panel_entries():
        where = (*path, "name") if isinstance(entry, LmEvalTasks | PanelSuite) else path
        if faults := list(not_plain(where, entry_name(entry))):
            yield from faults
            continue
        names = [suite.name for suite in panel.panel_suites(spec) if suite.path == path] or [entry_name(entry)]
        for name in names:
            if name in taken:
                hint = "choose another name" if where != path else "list it once"
                yield where, f"{shorten(name)} is the name of {taken[name]} too", hint
                break
        taken |= dict.fromkeys(names, f"evaluation.panel[{path[-1]}]")


@run_rule("what the panel's entries need is there")
def panel_source(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Packages of benchmarks are extras of sdkit, and lm-eval finds tasks of your own as YAML files in their folder or
    below it.  Without them, a run would end at its first evaluation.
    """
    for path, entry in spec.panel_entries():
        folder = entry.folder if isinstance(entry, LmEvalTasks) else None
        if folder and not os.path.isdir(context.file(folder)):
            yield (*path, "folder"), f"there is no folder {folder}", context.start_of((*path, "folder"), folder)
            continue
        if folder and not _has_yaml_file(context.file(folder)):
            yield (*path, "folder"), f"{folder} has no YAML file", None
        package, extra = PACKAGES.get(type(entry), (None, None))
        if package and not panel.is_installed(package):
            message = f"{entry.kind} needs a package that is missing: {package.replace('_', '-')}"
            yield path, message, f"pip install '{extra}'"


def _has_yaml_file(folder: str) -> bool:
    return any(name.endswith((".yaml", ".yml")) for _, _, names in os.walk(folder) for name in names)


@run_rule("the panel is evaluated together with the suites")
def panel_steps(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Between start and end the panel joins an evaluation that takes place anyway."""
    evaluation = spec.evaluation
    if not evaluation or not evaluation.panel_every:
        return
    path = ("evaluation", "panel_every")
    if not evaluation.panel:
        yield path, "panel_every has no effect without a panel", "add evaluation.panel"
    elif not evaluation.every or evaluation.panel_every % evaluation.every:
        stated = context.stated(("evaluation", "every"), evaluation.every)
        message = f"panel_every is {evaluation.panel_every}, but {stated}"
        yield path, message, f"use a multiple of {evaluation.every}" if evaluation.every else "set evaluation.every"
