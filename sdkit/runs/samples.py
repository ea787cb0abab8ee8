"""Samples as Markdown, to read beside the JSON lines: prompts, completions and scores of a few rollouts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

TEXTS = {"prompt": "prompt", "teacher_prompt": "teacher's prompt", "completion": "completion"}
"""Fields of a record that are texts, with their headings."""


def as_markdown(title: str, records: Iterable[Mapping[str, Any]]) -> str:
    """The records of `sample_texts` or of an evaluation as one page."""
    parts = [f"# {title}"]
    for record in records:
        parts.append(f"## {_heading(record)}")
        for field, name in TEXTS.items():
            if field == "completion" and "turns" in record:
                parts += [block for part in record["turns"] for block in _turn(part)]
            elif (text := record.get(field)) is not None:
                parts.append(_block(name, text))
    return "\n\n".join(parts) + "\n"


def _turn(part: Mapping[str, Any]) -> list[str]:
    """The blocks of a part of a trajectory: the teacher's prompt if the turn has one of its own, and the text."""
    heading, field = turn_heading(part), "teacher_prompt"
    own = [_block(f"{heading}, {TEXTS[field]}", part[field])] if field in part else []
    return [*own, _block(heading, part["text"])]


def _block(heading: str, text: str) -> str:
    return f"{heading}:\n\n{_fenced(text)}"


def turn_heading(part: Mapping[str, Any]) -> str:
    """A part of a trajectory: its turn and role, and the turn's reward if it has one."""
    reward = "" if part.get("reward") is None else f", reward {part['reward']:.3g}"
    return f"turn {part['turn']}, {part['role']}{reward}"


def ending_of(record: Mapping[str, Any]) -> list[str]:
    """Why a record's trajectory ended, in a list; empty for a completion of one turn."""
    return [f"ending {record['ending']}"] if record.get("ending") else []


def _heading(record: Mapping[str, Any]) -> str:
    """A record's suite and decoding, its row, whether it was cut, how its trajectory ended, and its scores."""
    parts = [str(record[field]) for field in ("suite", "decoding") if field in record]
    parts.append(f"row {record['row']}")
    parts += ["cut at the length limit"] if record.get("finished") is False else []
    parts += ending_of(record)
    scores = record.get("rewards", record.get("scores", {}))
    return ", ".join([*parts, *(f"{name} {value:.3g}" for name, value in scores.items())])


def _fenced(text: str) -> str:
    """The text in a code block, whose fence is longer than any row of backticks in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"
