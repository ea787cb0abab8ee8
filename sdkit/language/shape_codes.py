"""The codes of problems that are found before the rules run: in the file, in one key, or in an override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import frozen


@frozen
class ShapeCode:
    """The code of a problem, what it demands, and why.  It has the attributes of a rule."""

    code: str
    summary: str
    reason: str
    severity: Literal["error"] = "error"
    runs_only: bool = False


SHAPE_CODES: Mapping[str, ShapeCode] = {
    code: ShapeCode(code, summary, reason)
    for code, summary, reason in (
        (
            "yaml",
            "the file is one YAML document",
            "Until the text can be parsed, nothing else can be checked.  Common causes are an unclosed bracket or "
            'quote, a tab, or text that contains ": " without quotes.',
        ),
        (
            "duplicate_key",
            "a key stands once in a map",
            "Most parsers keep the last of two equal keys and drop the first silently.",
        ),
        (
            "key_type",
            "a key is text of at most 100 characters",
            "A number, `true` or a list in place of a key is a slip, or needs quotes.",
        ),
        (
            "tag",
            "the file has no YAML tags",
            "A tag such as `!!python/object` asks the parser to run code.  sdkit reads plain data only.",
        ),
        (
            "merge_key",
            "the file has no merge keys",
            "`<<` hides which line a value comes from.  An alias (`*name`) can stand for a whole value.",
        ),
        (
            "number",
            "a number is finite and of ordinary length",
            "No setting is infinite or undefined, and a number of more than forty digits is a slip.",
        ),
        (
            "method_file",
            "`method` names a packaged method or a file that can be read",
            "A name without a slash or an ending is that of a packaged page; anything else is a path that starts at "
            "the run file's folder, or at the working directory if it is an override.",
        ),
        (
            "method_page",
            "a method page has `rollout`, `teacher`, `losses` and `route` only",
            "A page defines a method, for any model and any data.  Model, data, rewards and the rest belong in the "
            "run file.",
        ),
        (
            "override",
            "an override has the form key.path=value",
            "The path leads through maps and lists of the spec, the value is YAML: `optimizer.lr=1e-5`, "
            "`rollout.stop.0=END`, `teacher.weights={kind: copy, every: 10}`.",
        ),
        (
            "unknown_key",
            "every key is one of the language",
            "An ignored key is a setting that its author believes to be in force.  `sdkit explain KEY` says where a "
            "key belongs.",
        ),
        (
            "missing_key",
            "every required key is there",
            "A key without a default is one for which no value is right for everybody.",
        ),
        (
            "kind",
            "`kind` is one of the choices",
            "`kind` decides which other keys a map has, so they are checked once it is right.",
        ),
        ("choice", "a value is one of the choices", "`sdkit explain KEY` lists them with their meanings."),
        (
            "type",
            "a value has the type of its key",
            'Values are not converted: "16" in quotes is text, and `off` is text too, as in YAML 1.2.',
        ),
        (
            "range",
            "a value lies in the range of its key",
            "Outside it a number has no meaning, or arithmetic in float32 overflows; an empty list or text would be "
            "silently without effect.",
        ),
        (
            "path",
            "a path has one meaning",
            "A path starts at the folder of the file that names it, on the command line at the working directory.  A "
            "model's path that is no folder from there is the id of a model of the hub; if it is a folder beside the "
            "run file, that would be loaded instead.",
        ),
        (
            "first_row",
            "the first row of a local data file has what the run reads",
            "A wrong column would otherwise show when the run starts.  `sdkit validate --data 2` checks every row and "
            "renders the prompts; it also reads data sets of the hub, where only the hub can tell which version a run "
            "would get.",
        ),
    )
}
"""Code → its explanation, in the order in which the problems are found."""
