"""What can be wrong, where, and how it is printed.  Knows nothing of YAML, specs or rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from attrs import frozen

Path = tuple[str | int, ...]
"""Where a value stands in a spec: map keys and list indices, outermost first."""

COMMAND_LINE = "<command line>"
MAX_LINE_WIDTH = 160  # characters shown of a line
MAX_SHOWN_PROBLEMS = 50  # problems on screen
MAX_WORD_LENGTH = 100  # characters of a word whose nearest spelling is looked for
MAX_CHOICES = 300  # words among which it is
MAX_LISTED_WORDS = 40  # words of a list in a message


@frozen
class Place:
    """A stretch of one line of a file; lines and columns count from 1."""

    file: str
    line: int
    column: int
    length: int = 1

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}:{self.column}"


@frozen
class Problem:
    """One thing that is wrong with a spec."""

    path: Path
    message: str
    code: str
    hint: str | None = None
    place: Place | None = None
    severity: Literal["error", "warning"] = "error"


# ── what stops a command ──────────────────────────────────────────────────────────────────────


class SdkitError(Exception):
    """What ends a command: one line for the user, an exit code, perhaps a hint and a place.

    `path` is the key of the spec that is to blame, where one is: the command line says where that is written.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        place: Place | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.place = place
        self.path = path


class RunFailed(SdkitError):
    """The spec has problems, or the run did not do what it should."""

    exit_code = 1


class UnreadableInput(SdkitError):
    """A wrong command line, or a file that cannot be read."""

    exit_code = 2


class BadData(SdkitError):
    """Rows that do not fit the spec."""

    exit_code = 3


class BadEnvironment(SdkitError):
    """A missing package, a port in use, a full disk."""

    exit_code = 4


class OutOfMemory(SdkitError):
    """No memory left."""

    exit_code = 5


class ProcessDied(SdkitError):
    """Another process of the run died, or a deadline passed."""

    exit_code = 6


class Stopped(SdkitError):
    """Stopped on request; the run can be resumed."""

    exit_code = 7


class NumericsGuard(SdkitError):
    """A number that must be finite or bounded was not."""

    exit_code = 8


INTERRUPTED = 130
"""How a command ends at once on Ctrl-C: 128 and the signal's number, as shells have it."""

EXIT_CODES: Mapping[int, str] = {
    0: "fine",
    1: "problems found, or a run failed",
    2: "usage or unreadable input",
    3: "bad data",
    4: "environment: a missing package, a port, the disk",
    5: "out of memory",
    6: "a process died or a deadline passed",
    7: "stopped on request; the run can be resumed",
    8: "a numerics guard tripped",
    INTERRUPTED: "interrupted at once",
}


@contextlib.contextmanager
def blaming(*path: str | int) -> Iterator[None]:
    """An SdkitError from in here blames this key of the spec, unless it blames one already."""
    try:
        yield
    except SdkitError as error:
        error.path = error.path or path
        raise


def first_of(faults: Sequence[str], shown: int = 20) -> str:
    """The first faults, one a line, and how many more there are."""
    more = [f"… and {len(faults) - shown} more"] if len(faults) > shown else []
    return "\n".join([*faults[:shown], *more])


# ── words ─────────────────────────────────────────────────────────────────────────────────────


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice spelt most like `word`, if any of the first few hundred is close."""
    from difflib import get_close_matches

    if len(word) > MAX_WORD_LENGTH:
        return None
    near = [c for c in islice(choices, MAX_CHOICES) if len(c) <= 3 * len(word)]
    return next(iter(get_close_matches(word, near, n=1)), None)


def listed(words: Iterable[object], last: str = ", ") -> str:
    """'a', 'b', 'c': each word as YAML shows it, text in quotes; of many words the first."""
    every = list(words)
    shown = [shorten(word) for word in every[:MAX_LISTED_WORDS]]
    if len(every) > MAX_LISTED_WORDS:
        return f"{', '.join(shown)} and {len(every) - MAX_LISTED_WORDS} more"
    return last.join(filter(None, [", ".join(shown[:-1]), shown[-1] if shown else ""]))


def outside(choices: Iterable[object]) -> str:
    """`is not one of 'a', 'b'`, or `is not 'a'` where there is no choice."""
    known = list(choices)
    return f"is not {'one of ' if len(known) > 1 else ''}{listed(known) or 'there'}"


def counted(number: int, noun: str, several: str | None = None) -> str:
    """`1 row`, `2 rows`; `several` is the plural where it takes more than an s."""
    return f"{number} {noun if number == 1 else several or noun + 's'}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the lines after it where it announces them by a colon; its type where
    it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end]) or type(error).__name__


def one_line(error: BaseException, limit: int = 600) -> str:
    """All of what an error says on one line, at most `limit` characters; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shorten(value: object, limit: int = 60) -> str:
    """A scalar as YAML writes it, text in quotes, on one line and not too long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return "null" if value is None else repr(value)
    text = value if len(value) <= limit else value[: limit - 1] + "…"
    return f"'{printable(text)}'"


def printable(text: str) -> str:
    """The text with every character that a terminal would not show as an escape, on one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spelled(path: Path) -> str:
    """A path as the command line writes it: `losses.distil.support`."""
    return ".".join(str(part) for part in path)


# ── output ────────────────────────────────────────────────────────────────────────────────────


def by_position(problem: Problem) -> tuple[str, int, int, str, str]:
    """The order in which problems are shown: file, then line, then column."""
    place = problem.place or Place("", 0, 0)
    return (place.file, place.line, place.column, problem.code, problem.message)


def render(problems: Sequence[Problem], sources: Mapping[str, str]) -> str:
    """The first problems for a terminal, in order, each with the line that it points at, and how many more there are."""
    lines = {name: text.splitlines() for name, text in sources.items()}
    first, rest = _select_shown(problems)
    return "\n".join([*(_render_one(p, lines) for p in first), *rest])


def _select_shown(problems: Sequence[Problem]) -> tuple[list[Problem], list[str]]:
    """The problems that are shown, errors rather than warnings, and a line on the rest where there are more."""
    ranked = sorted(problems, key=lambda p: (p.severity == "warning", by_position(p)))
    first = sorted(ranked[:MAX_SHOWN_PROBLEMS], key=by_position)
    rest = len(problems) - len(first)
    return first, [f"… and {counted(rest, 'more problem')}"] if rest else []


def _render_one(problem: Problem, lines: Mapping[str, list[str]]) -> str:
    place = problem.place
    where = f"{place}: " if place else ""
    warning = "warning: " if problem.severity == "warning" else ""
    out = [f"{where}{warning}{problem.message} [{problem.code}]"]
    margin = "  "
    if place and 0 < place.line <= len(lines.get(place.file, ())):
        margin = " " * (len(str(place.line)) + 1)
        text, marker = _excerpt(lines[place.file][place.line - 1], place.column - 1, place.length)
        out += [f"{place.line} | {text}", f"{margin}| {marker}"]
    if problem.hint:
        out += [f"{margin}= {problem.hint}"]
    return "\n".join(out)


def _excerpt(line: str, start: int, length: int) -> tuple[str, str]:
    """What is shown of a line, and the marker to stand beneath it."""
    line = "".join(c if c == "\t" else printable(c) for c in line.rstrip())
    if len(line) > MAX_LINE_WIDTH:
        first = max(0, min(start - MAX_LINE_WIDTH // 3, len(line) - MAX_LINE_WIDTH))
        line = ("…" if first else "") + line[first : first + MAX_LINE_WIDTH] + "…"
        start -= first - (1 if first else 0)
    # Tabs before the marker stay tabs, so that it stands under the text on any terminal.
    indent = "".join(c if c == "\t" else " " for c in line[:start].ljust(start))
    return line, indent + "^" * max(1, min(length, len(line) - start))


def as_json(problems: Sequence[Problem]) -> str:
    """The problems as a JSON list."""
    import json

    return json.dumps([_as_dict(p) for p in sorted(problems, key=by_position)], indent=2)


def _as_dict(problem: Problem) -> dict[str, object]:
    place = problem.place
    return {
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "length": place.length if place else None,
        "path": list(problem.path),
        "code": problem.code,
        "severity": problem.severity,
        "message": problem.message,
        "hint": problem.hint,
    }


def as_github(problems: Sequence[Problem]) -> str:
    """The problems as workflow commands of GitHub Actions, which annotates the lines of a pull request."""
    first, rest = _select_shown(problems)
    return "\n".join([*map(_github_line, first), *(f"::notice::{line}" for line in rest)])


def _github_line(problem: Problem) -> str:
    text = f"{problem.message} ({problem.hint})" if problem.hint else problem.message
    at = ""
    if place := problem.place:
        end = place.column + place.length
        at = f"file={_escape(place.file)},line={place.line},col={place.column},endColumn={end},"
    message = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{problem.severity} {at}title={_escape(problem.code)}::{message}"


def _escape(text: str) -> str:
    for char, code in {"%": "%25", "\r": "%0D", "\n": "%0A", ":": "%3A", ",": "%2C"}.items():
        text = text.replace(char, code)
    return text
