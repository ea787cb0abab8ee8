"""Slots that a model writes: what it is asked, and where its server may be."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import did_you_mean, outside, shorten
from sdkit.language.rules.base import Context, Finding, method_rule, run_rule, slots
from sdkit.language.rules.prompts import template_faults
from sdkit.language.rules.served import address_faults, variable_fault
from sdkit.language.templates import TemplateError, fields, parse

WRITER = ("teacher", "sees", "writer")
UNNAMED = "name-it-in-the-run-file"
"""The model of a method page, which leaves it to the run file."""


@method_rule("written slots have a writer, and a writer has slots to write")
def lone_writer(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """All slots of kind `written` are parts of one answer, that of the context's writer."""
    written = [path for path, _ in slots(spec, specs.Written)]
    if written and not spec.writer:
        yield written[0], "nothing writes this slot", "add teacher.sees.writer: {model: …, prompt: …}"
    elif spec.writer and not written:
        yield WRITER, "no slot is of kind written", "add one, or remove writer"


@run_rule("the run file names the writer")
def unnamed_writer(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A method page cannot know which model writes, so it says `name-it-in-the-run-file`."""
    if spec.writer and spec.writer.model == UNNAMED:
        message = "which model writes is left to the run file"
        yield (*WRITER, "model"), message, "add teacher: {sees: {writer: {url: …, model: …}}}"


@method_rule("a writer has a valid address, and its key is in an environment variable")
def writer_url(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Prompts and completions leave this machine only if the spec allows it, and specs contain no passwords or keys."""
    if writer := spec.writer:
        for message, hint in address_faults(writer.url, writer.allow_remote, "completions would be sent there"):
            yield (*WRITER, "url"), message, hint
        if fault := variable_fault(writer.key_from):
            yield (*WRITER, "key_from"), fault, "write key_from: WRITER_KEY, say, and export it"


@method_rule("the question to a writer uses its slots and shows the rollout")
def writer_prompt(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """`{prompt}` and `{trajectory}` are always known.  Without the trajectory every rollout of a prompt would have the same
    question; a slot that the question does not use is not shown.
    """
    writer, path = spec.writer, (*WRITER, "prompt")
    if writer is None:
        return
    yield from template_faults(path, writer.prompt)
    try:
        used = [str(field) for field in fields(parse(writer.prompt))]
    except TemplateError:
        return
    known = ["prompt", "trajectory", *writer.slots]
    for name in used:
        if name not in known and "." not in name:
            hint = did_you_mean(name, known) or f"declare it: slots: {{{name}: …}}"
            yield path, f"{{{name}}} {outside(known)}", hint
    if "trajectory" not in used:
        yield path, "the question does not show the rollout", "add {trajectory}"
    for name in writer.slots:
        if name in ("prompt", "trajectory"):
            yield (*WRITER, "slots", name), f"{{{name}}} is always known and cannot be a slot", "rename the slot"
        elif name not in used:
            message = f"slot {shorten(name)} is not in the question"
            yield (*WRITER, "slots", name), message, f"use {{{name}}}, or remove the slot"


@method_rule("a writer is asked about a whole rollout")
def writer_turn(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """There is one question about a trajectory, and feedback on each turn has another text for each."""
    for name, slot in spec.writer.slots.items() if spec.writer else ():
        if specs.is_by_turn(slot):
            yield (*WRITER, "slots", name, "of"), "the question is about all turns at once", "use of: trajectory"


@method_rule("texts of single turns have a key")
def turn_key(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A text for each turn is found by its number in a JSON object."""
    for path, slot in slots(spec, specs.Written):
        if slot.of == "turn" and slot.key is None:
            message = "a text for each turn stands in a JSON object, and no key names it"
            yield (*path, "of"), message, "add key: …, or use of: trajectory"


@method_rule("a slot gives way to another one that can be empty")
def gives_way(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """`unless` names another slot of the context.  A text of the spec is never empty, and of two slots that give way to each
    other none would be shown.
    """
    for path, slot in slots(spec, specs.Written):
        other = spec.slots.get(slot.unless or "")
        if slot.unless is None:
            continue
        where, name = (*path, "unless"), shorten(slot.unless)
        if other is None or slot.unless == path[-1]:
            known = [known for known in spec.slots if known != path[-1]]
            yield where, f"slot {name} {outside(known)}", did_you_mean(slot.unless, known)
        elif isinstance(other, specs.Wording):
            yield where, f"slot {name} is never empty", "remove unless, or the slot"
        elif isinstance(other, specs.Written) and other.unless is not None:
            yield where, f"slot {name} itself gives way to another", "name a slot without unless"


@run_rule("other ranks wait for a writer's answers")
def writer_deadline(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Ranks that have their answers wait for the others, at most `training.deadline_seconds`."""
    limit = spec.training.deadline_seconds
    if spec.writer and spec.writer.deadline_seconds >= limit:
        stated = context.stated(("training", "deadline_seconds"), limit, "training.deadline_seconds")
        message = f"ranks may wait for {spec.writer.deadline_seconds:g} s, but {stated}"
        yield (*WRITER, "deadline_seconds"), message, "lower this one, or raise the other"
