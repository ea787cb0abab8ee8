"""Writes a report: one page with its style, its scripts and its data, which loads nothing.

All text of models and data goes through Jinja's escaping or, as JSON, through `_embedded`; the scripts write it as text,
never as HTML.  A content security policy allows the page's own scripts by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdkit import __version__
from sdkit.language.errors import BadEnvironment, UnreadableInput
from sdkit.report import charts, completions, facts, retention, scores, sequences
from sdkit.report.completions import HELD_OUT_BYTES, ROLLOUT_BYTES, Texts
from sdkit.report.prompts import tokenizer_of
from sdkit.report.records import Contents, RunRecord, read_contents
from sdkit.runs.history import AXES, Axis

TEMPLATES = files("sdkit.report") / "templates"
SCRIPTS = ("charts.js", "completions.js")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters besides tab and newline, marks that reorder or hide text, and halves of characters."""


def write_report(paths: Sequence[Path], target: Path, axis: Axis) -> None:
    """Write the report of the runs in these folders; `axis` is the budget at which they are compared.

    Raises UnreadableInput if a folder is not a run directory or one of its files is damaged, BadEnvironment if `target`
    cannot be written.
    """
    check_target(target)
    text = render(read_contents(paths), axis)
    try:
        target.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadEnvironment(f"cannot write {target}: {error.strerror}") from None


def check_target(target: Path) -> None:
    """Raise UnreadableInput if `target` is not the name of a page in an existing folder."""
    if target.suffix.lower() not in (".html", ".htm"):
        raise UnreadableInput(f"{target} is not the name of a page: it must end in .html")
    if not target.resolve().parent.is_dir():
        raise UnreadableInput(f"{target.parent} is not a folder")


def render(contents: Contents, axis: Axis = "tokens") -> str:
    """The page; `axis` is the budget at which runs are compared.  Raises as `write_report`."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "whole": lambda text: text.replace(", ", ",\N{NO-BREAK SPACE}")}
    scripts = [get_plotlyjs(), *((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    subjects, records = contents.subjects, contents.records
    several = len(records) > 1
    of_sequences = [sequences.sequence_table(sequence) for sequence in contents.sequences]
    data = _data(contents)
    panel = retention.retention_tables(subjects)
    pairs, without_pair = scores.verdicts(subjects, axis) if several else ([], [])
    return environment.from_string((TEMPLATES / "page.html").read_text(encoding="utf-8")).render(
        title=facts.few_names(contents.names),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        policy=_policy(scripts),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        data=_embedded(
            {**data, "sequences": [table.plot for table in of_sequences], "retention": panel.plot if panel else []}
        ),
        runs=[{"name": subject.name, "facts": facts.headings(subject)} for subject in subjects],
        sets=contents.sets,
        several=several,
        notices=facts.notices(contents),
        table=scores.score_table(subjects),
        turns=scores.turn_table(records),
        turn_charts=any(chart["place"] == charts.BY_TURN for chart in data["charts"]),
        retention=panel,
        sequences=of_sequences,
        sequence_differences=sequences.sequence_differences(contents.sequences),
        verdicts=pairs,
        without_pair=without_pair,
        axes=AXES,
        objectives=facts.objectives(subjects),
        differences=facts.differences(subjects) if len(subjects) > 1 else [],
        settings=facts.settings(subjects),
        written=[(subject.name, _written(subject.records[0])) for subject in subjects],
        origins=[(record.run.name, facts.origins(record), facts.attempts(record)) for record in records],
        cost=facts.cost(subjects),
    )


def visible(text: str) -> str:
    """The text with control characters, and marks that hide or reorder text, in a visible form."""
    return _INVISIBLE.sub(lambda match: _named(match[0]), text)


def _named(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode has a picture of each
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return f"⟨U+{code:04X}⟩"


def _written(record: RunRecord) -> str:
    """The run file as written; empty if the run does not have it."""
    path = record.run.path / "spec.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _data(contents: Contents) -> dict[str, Any]:
    """What the scripts read, besides the sequences."""
    records = contents.records
    shown, texts = charts.charts(records), Texts()
    runs: list[dict[str, Any]] = []
    for record in records:
        tokenizer = tokenizer_of(record)
        held_out = completions.held_out(record, tokenizer, texts, HELD_OUT_BYTES // len(records))
        rollouts = completions.rollouts(record, tokenizer, texts, ROLLOUT_BYTES // len(records))
        runs.append({"name": record.run.name, "held_out": held_out, "rollouts": rollouts})
    return {**charts.data(shown, contents), "axes": AXES, "completions": runs, "texts": texts.texts}


def _embedded(data: Any) -> str:
    """JSON that ends no element `script`: `<` and `&` occur only as escapes, invisible characters in a visible form."""
    text = json.dumps(_visible(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026").replace(">", "\\u003e")


def _visible(data: Any) -> Any:
    match data:
        case str():
            return visible(data)
        case dict():
            return {_visible(key): _visible(value) for key, value in data.items()}
        case list() | tuple():
            return [_visible(value) for value in data]
        case float() if data != data or abs(data) == float("inf"):
            return None
        case _:
            return data


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts and the page's own styles, no request to anywhere."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
