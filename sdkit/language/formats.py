"""Problems in the formats of other programs: JSON, GitHub Actions, SARIF."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdkit.language.errors import Problem, by_position, select_shown
from sdkit.language.source import MULTILINE

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def as_json(problems: Sequence[Problem]) -> str:
    """Formats problems as a JSON list."""
    return json.dumps([p.as_dict() for p in sorted(problems, key=by_position)], indent=2)


def as_github(problems: Sequence[Problem]) -> str:
    """Formats problems as GitHub Actions workflow commands, which annotate the lines of a pull request."""
    shown, footer = select_shown(problems)
    return "\n".join([*map(_github_line, shown), *(f"::notice::{line}" for line in footer)])


def _github_line(problem: Problem) -> str:
    at = ""
    if place := problem.place:
        end = place.column + place.length
        at = f"file={_escape(place.file)},line={place.line},col={place.column},endColumn={end},"
    message = _with_hint(problem).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{problem.severity} {at}title={_escape(problem.code)}::{message}"


def _escape(text: str) -> str:
    for char, code in {"%": "%25", "\r": "%0D", "\n": "%0A", ":": "%3A", ",": "%2C"}.items():
        text = text.replace(char, code)
    return text


def as_sarif(problems: Sequence[Problem]) -> str:
    """Formats problems as a SARIF 2.1.0 log, which code scanning and editors read, with the rules that are broken."""
    from sdkit import __version__
    from sdkit.language.explain import codes

    problems = sorted(problems, key=by_position)
    known = codes()
    rules = [
        {
            "id": code,
            "shortDescription": {"text": known[code].summary},
            "fullDescription": {"text": known[code].reason},
            "defaultConfiguration": {"level": known[code].severity},
        }
        for code in dict.fromkeys(problem.code for problem in problems)
    ]
    run = {
        "tool": {"driver": {"name": "sdkit", "version": __version__, "rules": rules}},
        "columnKind": "unicodeCodePoints",
        "results": [_sarif_result(problem) for problem in problems],
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _sarif_result(problem: Problem) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": problem.code,
        "level": problem.severity,
        "message": {"text": _with_hint(problem)},
    }
    if place := problem.place:
        region = {"startLine": place.line, "startColumn": place.column}
        if place.length < MULTILINE:
            region["endColumn"] = place.column + place.length
        artifact = {"uri": _uri(place.file)}
        result["locations"] = [{"physicalLocation": {"artifactLocation": artifact, "region": region}}]
    return result


def _uri(file: str) -> str:
    return Path(file).as_uri() if os.path.isabs(file) else quote(os.fsencode(Path(file).as_posix()))


def _with_hint(problem: Problem) -> str:
    return f"{problem.message} ({problem.hint})" if problem.hint else problem.message
