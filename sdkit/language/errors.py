"""Problems and errors: their classes, exit codes and text on a terminal.  Knows nothing of YAML, specs or rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from attrs import frozen

Path = tuple[str | int, ...]
"""The location of a value in a spec: map keys and list indices, outermost first."""

COMMAND_LINE = "<command line>"
MAX_LINE_WIDTH = 160  # characters of a source line on screen
MAX_SHOWN_PROBLEMS = 50  # problems on screen
MAX_WORD_LENGTH = 100  # characters; longer words get no spelling suggestion
MAX_CHOICES = 1000  # candidates searched for a spelling suggestion
MAX_LISTED_WORDS = 40  # words listed in one message


@frozen
class Place:
    """A span within one line of a file; lines and columns count from 1."""

    file: str
    line: int
    column: int
    length: int = 1

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}:{self.column}"


@frozen
class Problem:
    """One error or warning about a spec."""

    path: Path
    message: str
    code: str
    hint: str | None = None
    place: Place | None = None
    severity: Literal["error", "warning"] = "error"

    def as_dict(self) -> dict[str, object]:
        """Returns the problem as JSON values, with the keys of `sdkit validate --format json`."""
        place = self.place
        return {
            "file": place.file if place else None,
            "line": place.line if place else None,
            "column": place.column if place else None,
            "length": place.length if place else None,
            "path": list(self.path),
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "hint": self.hint,
        }


class SdkitError(Exception):
    """Base class of the errors that end a command: a one-line message, an exit code, an optional hint and place.

    `path` is the spec key that caused the error, if one did; the CLI prints where that key is written.
    """

    exit_code = 1
    is_failure = True

    def __init__(
        self, message: str, *, hint: str | None = None, place: Place | None = None, path: Path | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.place = place
        self.path = path


class RunFailed(SdkitError):
    """The spec has problems, or the run failed."""


class InvalidSpec(RunFailed):
    """A spec has errors.  `problems` lists them and any warnings; the message shows them with their source lines."""

    def __init__(self, problems: Sequence[Problem], sources: Mapping[str, str]) -> None:
        super().__init__(render(problems, sources))
        self.problems = tuple(problems)


class UnreadableInput(SdkitError):
    """A wrong command line, or an input that cannot be read."""

    exit_code = 2


class BadData(SdkitError):
    """The data does not match the spec."""

    exit_code = 3


class BadEnvironment(SdkitError):
    """A missing package, a port in use, or a full disk."""

    exit_code = 4


class OutOfMemory(SdkitError):
    """Out of memory."""

    exit_code = 5


class ProcessDied(SdkitError):
    """Another process of the run died, or a time limit expired."""

    exit_code = 6


class Stopped(SdkitError):
    """Stopped on request; `--resume` continues."""

    exit_code = 7
    is_failure = False


class NumericsGuard(SdkitError):
    """A loss or gradient is not finite, or another numerics check failed."""

    exit_code = 8


class Diverged(SdkitError):
    """The run diverged: its loss, gradient or score was far from its own history at the last step, or a tripwire stopped it."""

    exit_code = 9


INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 plus the signal number, the convention of shells."""

ERRORS: Mapping[int, type[SdkitError]] = {error.exit_code: error for error in SdkitError.__subclasses__()}
"""Exit code → the error that ends a command with it."""

EXIT_CODES: Mapping[int, str] = {
    0: "Success.",
    **{code: error.__doc__ or "" for code, error in ERRORS.items()},
    INTERRUPTED: "Interrupted at once.",
}
"""The exit codes of the command, for its help text and docs/runs.md."""


@contextlib.contextmanager
def blaming(*path: str | int) -> Iterator[None]:
    """Context manager that sets `path` on an SdkitError raised inside it, unless the error already has one."""
    try:
        yield
    except SdkitError as error:
        error.path = error.path or path
        raise


def first_of(faults: Sequence[str], limit: int = 20) -> str:
    """Returns the first `limit` faults, one per line, and the number of the remaining ones."""
    more = [f"… and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join([*faults[:limit], *more])


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the choice spelled most like `word`, or None if none of the first `MAX_CHOICES` is close.

    Two words are close if difflib's ratio of their common letters is at least `cutoff`.  Of words that differ in nothing but
    capital letters, the first is the nearest.
    """
    from difflib import get_close_matches

    if len(word) > MAX_WORD_LENGTH:
        return None
    candidates = [c for c in islice(choices, MAX_CHOICES) if len(c) <= 3 * len(word)]
    same = (c for c in candidates if c.lower() == word.lower())
    return next(same, None) or next(iter(get_close_matches(word, candidates, n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """Returns a hint with the choice spelled most like `word`, or None if none is close."""
    close = nearest(word, choices)
    return f'did you mean "{close}"?' if close else None


def listed(words: Iterable[object], last: str = ", ") -> str:
    """Joins words as YAML writes them: `'a', 'b', 'c'`.  Lists at most `MAX_LISTED_WORDS`, then how many remain."""
    words = list(words)
    shown = [shorten(word) for word in words[:MAX_LISTED_WORDS]]
    if len(words) > MAX_LISTED_WORDS:
        return f"{', '.join(shown)} and {len(words) - MAX_LISTED_WORDS} more"
    return last.join(filter(None, [", ".join(shown[:-1]), shown[-1] if shown else ""]))


def outside(choices: Iterable[object]) -> str:
    """Returns `is not one of 'a', 'b'`, or `is not 'a'` if there is a single choice."""
    known = list(choices)
    return f"is not {'one of ' if len(known) > 1 else ''}{listed(known) or 'there'}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Returns `1 row` or `2 rows`; `plural` is the irregular plural."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if the message is empty.

    A first line that ends in a colon introduces the next one, so that line is included too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end]) or type(error).__name__


def one_line(error: BaseException, limit: int = 600) -> str:
    """Returns an error's message on one line of at most `limit` characters, or its type if the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shorten(value: object, limit: int = 60) -> str:
    """Returns a scalar as YAML writes it: on one line, text in quotes and cut to `limit` characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return "null" if value is None else repr(value)
    text = value if len(value) <= limit else value[: limit - 1] + "…"
    return f"'{printable(text)}'"


def printable(text: str) -> str:
    """Returns the text on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spelled(path: Path) -> str:
    """Returns a path as written on the command line: `losses.distil.support`."""
    return ".".join(str(part) for part in path)


def by_position(problem: Problem) -> tuple[str, int, int, str, str]:
    """Sort key of problems: file, line, column."""
    place = problem.place or Place("", 0, 0)
    return (place.file, place.line, place.column, problem.code, problem.message)


def render(problems: Sequence[Problem], sources: Mapping[str, str]) -> str:
    """Formats problems for a terminal, each with its source line; at most `MAX_SHOWN_PROBLEMS`, then how many remain."""
    lines = {name: text.splitlines() for name, text in sources.items()}
    shown, footer = select_shown(problems)
    return "\n".join([*(_render_one(p, lines) for p in shown), *footer])


def select_shown(problems: Sequence[Problem]) -> tuple[list[Problem], list[str]]:
    """Returns the problems to show, errors before warnings, and a line that counts the remaining ones, if any."""
    ranked = sorted(problems, key=lambda p: (p.severity == "warning", by_position(p)))
    shown = sorted(ranked[:MAX_SHOWN_PROBLEMS], key=by_position)
    remaining = len(problems) - len(shown)
    return shown, [f"… and {counted(remaining, 'more problem')}"] if remaining else []


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
    """The visible part of a line, and the marker to print below it."""
    line = "".join(c if c == "\t" else printable(c) for c in line.rstrip())
    if len(line) > MAX_LINE_WIDTH:
        first = max(0, min(start - MAX_LINE_WIDTH // 3, len(line) - MAX_LINE_WIDTH))
        line = ("…" if first else "") + line[first : first + MAX_LINE_WIDTH] + "…"
        start -= first - (1 if first else 0)
    # Keep tabs as tabs, so that the marker lines up at any tab width.
    indent = "".join(c if c == "\t" else " " for c in line[:start].ljust(start))
    return line, indent + "^" * max(1, min(length, len(line) - start))
