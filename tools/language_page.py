"""docs/language.md: the keys of the language, grouped by the questions that a reader asks.

`tools/freeze_surface.py` writes the page.  Keys, ranges and texts come from the spec classes, examples from specs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, get_args, get_origin

import attrs
from language_examples import example, run_file

from sdkit.language import specs, suggestions, wording
from sdkit.language.errors import spelled
from sdkit.language.introspection import Key, default_kind, is_inherited, is_spec, keys_of, members, shared_keys
from sdkit.language.specs import ExperimentSpec, Schedule, Table

INTRODUCTION = """# The language, key by key

A **method page** has the keys `rollout`, `teacher`, `losses` and `route`.  A **run file** names a method page
(`method: sdft`, or `method: ./mine.yaml`), may override its keys, and adds the model, the data and the rest.  The
[glossary](glossary.md) defines the terms, the [rules](rules.md) say which keys fit together, and
`sdkit show SPEC` prints every value of a spec with the line it comes from.  `sdkit explain KEY` prints in the terminal
what stands here, and [editors](editors.md) complete and check keys.

**Kinds.** Where there is a choice, `kind` names it: `divergence: {kind: jsd, teacher_share: 0.3}`.  A kind whose other
keys all have defaults can be written as its bare name: `divergence: jsd`.

**Paths.** A relative path starts at the folder of the file that names it, be that a run file or a method page; on the
command line it starts at the working directory.  `~` is your home folder.  `sdkit show SPEC` prints what each path means.

**Tables.** `takes` is the type of the value.  A *table* is a map from names of your choice to values; `NAME` stands for
such a name in headings.  `{…}` is a map whose keys the link shows.  Numbers have an upper limit of 1e6, whole numbers of
1e9, where nothing else is said; an error gives the exact range.

This page is written by `tools/freeze_surface.py` from the spec classes and from specs that the tests load.
"""
CHAPTERS: list[tuple[str, list[Any]]] = [
    ("What does a file contain?", [ExperimentSpec]),
    ("Who samples?", [specs.RolloutSpec, specs.SampledBy, specs.StartsWith]),
    ("Which engine samples?", [specs.Backend]),
    ("Which rollouts are trained on?", [specs.Keep]),
    ("Which weights does the teacher have?", [specs.TeacherSpec, specs.TeacherWeights]),
    ("What does the teacher see?", [specs.Sees, specs.Turn, specs.Slot, specs.Writer]),
    ("What is the teacher blended with?", [specs.Blend]),
    ("What is the loss?", [specs.Loss]),
    ("What is compared?", [specs.Divergence, specs.DivergenceClip, specs.Support]),
    ("What is reinforced?", [specs.Advantage, specs.OverlongPenalty, specs.ClipSpec]),
    (
        "Which tokens count, and how much?",
        [specs.MaskSpec, specs.TurnRange, specs.TextSpans, specs.Weight, specs.RouteSpec],
    ),
    (
        "How are tokens from other weights or another engine corrected?",
        [specs.ImportanceSpec, specs.PolicyImportance, specs.OldPolicyRatio, specs.SamplerRatio],
    ),
    ("How are losses averaged?", [specs.Average]),
    ("How does a number change during a run?", [Schedule]),
    ("Which model is trained?", [specs.ModelSpec, specs.LoraSpec, specs.ShapeSpec]),
    (
        "Where does the data come from?",
        [specs.DataSpec, specs.ColumnTemplate, specs.LastTurn, specs.ChatTurns, specs.JsonColumn, specs.Source],
    ),
    ("How are completions rewarded?", [specs.Reward, specs.Extract]),
    ("What follows a turn?", [specs.Environment, specs.ToolCalls]),
    ("How is a run evaluated?", [specs.EvaluationSpec, specs.Suite, specs.Decoding]),
    ("What must training not lose?", [specs.PanelEntry]),
    ("How are the weights updated?", [specs.OptimizerSpec]),
    ("How long does a run train, and with which batches?", [specs.TrainingSpec]),
    ("Which machine is planned for?", [specs.MachineSpec]),
    ("What does a run write?", [specs.OutputSpec, specs.CollapseSpec, specs.StepCollapse, specs.ScoreCollapse]),
]

TITLES: dict[type, str] = {ExperimentSpec: "Run files", Schedule: "Schedules"}
"""Headings of classes that have no path of their own."""
NAMES = "What is it called elsewhere?"


def page() -> str:
    """The whole page.  Raises ValueError if a chapter is missing for a class of the language."""
    listed = {cls for _, topics in CHAPTERS for topic in topics for cls in members(topic)}
    if missing := places().keys() ^ listed:
        raise ValueError(f"CHAPTERS does not fit the language: {', '.join(sorted(c.__name__ for c in missing))}")
    contents = [f"- [{title}](#{anchor(title)})" for title, _ in CHAPTERS] + [f"- [{NAMES}](#{anchor(NAMES)})"]
    parts = [INTRODUCTION, "\n".join(contents) + "\n"]
    for title, topics in CHAPTERS:
        parts.append(f"## {title}\n")
        for topic in topics:
            parts += [_class_section(topic)] if is_spec(topic) else list(_union_sections(topic))
    return "\n".join([*parts, _names_elsewhere()])


@attrs.frozen
class Place:
    """Where a class is used first: its path in YAML, with NAME for a chosen name, and its key."""

    path: str
    key: Key | None
    owner: type | None  # the class that declares the key, if it is a kind


@cache
def places() -> dict[type, Place]:
    """Every spec class with its first place, in the order in which the language reaches them."""
    found: dict[type, Place] = {}

    def visit(tp: Any, path: str, key: Key | None, owner: type | None) -> None:
        if is_spec(tp):
            if tp not in found:
                found[tp] = Place(path or "run file", key, owner)
                for below in keys_of(tp).values():
                    owner = tp if hasattr(tp, "kind") and not is_inherited(below, tp) else None
                    visit(below.type, f"{path}.{below.name}".lstrip("."), below, owner)
        else:
            for part in get_args(tp):
                visit(part, f"{path}.NAME" if get_origin(tp) is Table else path, key, owner)

    visit(ExperimentSpec, "", None, None)
    return found


def heading(cls: type) -> str:
    """The heading of a class: `divergence: jsd` for a kind, else its path."""
    if cls in TITLES:
        return TITLES[cls]
    place = places()[cls]
    if hasattr(cls, "kind") and place.key:
        return f"`{place.key.name}: {cls.kind}`"
    return f"`{place.path}`" + (f" of `{place.owner.kind}`" if place.owner else "")


def anchor(title: str) -> str:
    """The anchor that GitHub and the documentation site give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _class_section(cls: type) -> str:
    return _section(f"### {heading(cls)}", cls, keys_of(cls).values())


def _union_sections(union: Any) -> Iterator[str]:
    """A section for the choice, with the keys that all kinds share, and one for each kind."""
    classes = members(union)
    place = places()[classes[0]]
    assert place.key
    shared = shared_keys(classes)
    text = f"### `{place.path}`\n\n{_sentence(place.key.help)} One of {wording.kinds(classes, _link)}."
    if default := default_kind(frozenset(classes)):
        text += f" Without `kind` it is `{default.kind}`."
    if shared:
        text += "\n\nAll kinds have these keys:\n\n" + _table(shared)
    yield text + "\n"
    for cls in classes:
        own = [key for key in keys_of(cls).values() if key not in shared]
        yield _section(f"#### {heading(cls)}", cls, own)


def _section(title: str, cls: type, keys: Iterable[Key]) -> str:
    key = places()[cls].key
    shown = example(cls, key) if key else run_file()
    parts = [title, inspect.cleandoc(cls.__doc__ or ""), _table(keys), shown]
    return "\n\n".join(filter(None, parts)) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(keys: Iterable[Key]) -> str:
    """A row for each key; empty without keys."""
    rows = []
    for key in keys:
        default = "**required**" if key.required else wording.default(key)
        cells = (f"`{key.name}`", wording.takes(key, _link), default, key.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *rows]) if rows else ""


def _link(label: str, target: type | Sequence[type]) -> str:
    """A link to the section of a class, or of a choice between classes."""
    title = heading(target) if isinstance(target, type) else places()[target[0]].path
    return f"[{label}](#{anchor(title)})"


def _names_elsewhere() -> str:
    """A table of the names that other toolkits use, from the hints for unknown keys."""
    paths: dict[str, set[str]] = {}
    for at in suggestions.all_keys():
        paths.setdefault(at.key.name, set()).add(spelled(at.path))
    rows = []
    for name, keys in sorted(suggestions.SYNONYMS.items()):
        # A key that stands in several places is named without its path.
        here = [f"`{min(paths[key]) if len(paths[key]) == 1 else key}`" for key in keys if key in paths]
        if here and name not in paths:
            rows.append(f"| `{name}` | {wording.either(here)} |")
    table = "\n".join(["| elsewhere | here |", "|---|---|", *rows])
    return f"## {NAMES}\n\nAn unknown key with one of these names is an error that says sdkit's name.\n\n{table}\n"
