"""Templates: the teacher's context, and columns built from other columns."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import Path, did_you_mean, outside, shorten
from sdkit.language.rules.base import Context, Finding, data_of, method_rule, run_rule
from sdkit.language.specs import ColumnTemplate, EarlierTurns, ExperimentSpec, MethodSpec, Sees, UserTurn, Wording
from sdkit.language.templates import Field, TemplateError, fields, parse


def _templates(sees: Sees) -> Iterator[tuple[Path, str]]:
    """Every template of the teacher's context, with its path."""
    path = ("teacher", "sees")
    if isinstance(sees, EarlierTurns):
        for index, turn in enumerate(sees.turns):
            yield (*path, "turns", index, "user"), turn.user
            yield (*path, "turns", index, "assistant"), turn.assistant
    else:
        yield (*path, "template"), sees.template


def _used(sees: Sees) -> Iterator[tuple[Path, Field]]:
    """Every field of the templates that parse."""
    for path, text in _templates(sees):
        try:
            yield from ((path, field) for field in fields(parse(text)))
        except TemplateError:
            continue


def template_faults(path: Path, text: str, *, allow_keys: bool = False) -> Iterator[Finding]:
    """What is wrong with a template: its braces, and keys below a name where none are allowed."""
    try:
        template = parse(text)
    except TemplateError as error:
        near = shorten(text[max(0, error.offset - 10) : error.offset + 15])
        yield path, f"{error} near {near}", "write {{ and }} for braces that are text"
        return
    for field in fields(template) if not allow_keys else ():
        if field.path:
            message = f"{{{field}}} reaches into a slot, which is text"
            yield path, message, "build the text in data.columns, where {column.key} is possible"


@method_rule("templates parse")
def template_syntax(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """`{name}` is filled in; `{{` and `}}` stand for literal braces.  Any other brace is an error."""
    if not spec.sees:
        return
    for path, text in _templates(spec.sees):
        yield from template_faults(path, text)
    for path, slot in spec.placed_slots():
        if not isinstance(slot, Wording):
            where = (*path, "wrap")
            yield from template_faults(where, slot.wrap)
            yield from _value_only(where, slot.wrap)


def _value_only(path: Path, wrap: str) -> Iterator[Finding]:
    """`wrap` must contain {value} and no other field."""
    try:
        names = [str(field) for field in fields(parse(wrap))]
    except TemplateError:
        return
    for name in names:
        if name != "value":
            yield path, f"{{{name}}} is not '{{value}}', all that wrap knows", None
    if not names:
        yield path, "wrap has no {value}", "write {value} where the text belongs"


@run_rule("column templates parse")
def column_template_syntax(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`{column}` and `{column.key}` are filled in; `{{` and `}}` stand for literal braces."""
    for path, data in data_of(spec):
        for name, column in (data.columns or {}).items():
            if isinstance(column, ColumnTemplate):
                where = (*path, "columns", name, "template")
                yield from template_faults(where, column.template, allow_keys=True)


@method_rule("templates use declared slots")
def unknown_slot(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A field without a slot could not be filled in."""
    known = ["prompt", *spec.slots]
    for path, field in _used(spec.sees) if spec.sees else ():
        if field.name not in known:
            hint = did_you_mean(field.name, known) or f"declare it: slots: {{{field.name}: …}}"
            yield path, f"{{{field}}} {outside(known)}", hint


@method_rule("declared slots are used")
def unused_slot(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The teacher never sees a slot that no template uses."""
    sees = spec.sees
    if not sees or any(list(template_faults((), text, allow_keys=True)) for _, text in _templates(sees)):
        return
    used = {field.name for _, field in _used(sees)}
    for name in sees.slots:
        if name not in used and name != "prompt":
            message = f"slot {shorten(name)} is in no template"
            yield ("teacher", "sees", "slots", name), message, f"use {{{name}}}, or remove the slot"


@method_rule("a user_turn template contains the prompt")
def prompt_missing(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The template replaces the user's message; without {prompt} the teacher would answer another question."""
    sees = spec.sees
    if not isinstance(sees, UserTurn) or any(template_faults((), sees.template, allow_keys=True)):
        return
    if not any(field.name == "prompt" for _, field in _used(sees)):
        message = "the template takes the user's place, but has no {prompt}"
        yield ("teacher", "sees", "template"), message, "add {prompt}, or use kind: system_message"


@method_rule("no slot is named prompt")
def reserved_slot(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """{prompt} is always the student's last user message."""
    if "prompt" in spec.slots:
        path = ("teacher", "sees", "slots", "prompt")
        yield path, "'prompt' is always the user's message and cannot be a slot", "rename the slot"
