"""What sdkit prints: warnings in one form, what it is doing, and nothing of what libraries print.  Only the first rank
prints.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task

Advance = Callable[[float], None]
"""Adds to the number of parts of a phase that are done."""


def no_progress(_: float) -> None:
    """An `Advance` that shows nothing."""


def is_first_rank() -> bool:
    """Whether this is the first or only rank, also before the process group exists; others print nothing but errors."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Whether this is the first or only rank of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def print_warning(console: Console, text: str, advice: str | None = None) -> None:
    """Print a warning and, on a line of its own, what to do about it."""
    from rich.markup import escape

    console.print(f"[yellow]warning[/]: {escape(text)}", highlight=False)
    if advice is not None:
        console.print(f"  = {escape(advice)}", highlight=False)


class Phases:
    """Shows what a command is doing: on a terminal as bars below the printed lines, in a log as a line for each phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = self._new_bars(capture=False)

    @contextlib.contextmanager
    def phase(
        self,
        name: str,
        total: int | None = None,
        *,
        done: int = 0,
        log: bool = True,
        time_left: Callable[[], float | None] | None = None,
    ) -> Iterator[Advance]:
        """Show a phase until the block ends; yields a function that adds to the number of parts done.

        `total` is the number of parts, if it is known.  With `log` False, the phase is shown on terminals only.
        `time_left` returns the seconds that the phase still takes, None while that is not known; without it the bar
        assumes that every part takes equally long.
        """
        if log and not self._console.is_terminal:
            self._console.print(f"[dim]{name} …[/]", highlight=False)
        if not self._bars.tasks:
            self._bars = self._new_bars(capture=not log)
            self._bars.start()
        task = self._bars.add_task(name, total=total, completed=done, done=done, time_left=time_left)
        try:
            yield partial(self._bars.advance, task)
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()

    def _new_bars(self, *, capture: bool) -> Progress:
        """New bars.  `capture`: print what libraries write above them; a library that loads meanwhile would keep the
        replaced streams.
        """
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Amounts(ProgressColumn):
            """Parts done and time left, where they are known."""

            def render(self, task: Task) -> Text:
                left = _time_left(task)
                return Text(f"{_parts(task)}{'' if left is None else f', {readable_duration(left)} left'}")

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            Amounts(),
            console=self._console,
            transient=True,
            redirect_stdout=capture,
            redirect_stderr=capture,
            disable=not self._console.is_terminal,
        )


def _parts(task: Task) -> str:
    """The parts of a phase that are done, of how many; empty if the number is not known."""
    return "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"


def _time_left(task: Task) -> float | None:
    """The seconds that a phase still takes; None if they are not known."""
    if task.fields["time_left"]:
        return task.fields["time_left"]()
    finished = task.completed - task.fields["done"]
    if task.total is None or task.elapsed is None or finished <= 0:
        return None
    return task.elapsed / finished * (task.total - task.completed)


def readable_duration(seconds: float) -> str:
    """Returns a duration as people say it: `40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


class TimestampedStream:
    """A text stream that begins every line with the time of day, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_line_start = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            if self._at_line_start:
                self._stream.write(time.strftime("%H:%M:%S "))
            self._stream.write(line)
            self._at_line_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet(progress: bool = True) -> Iterator[None]:
    """Inside the block, discard what libraries print to stdout; with SDKIT_DEBUG set, redirect it to stderr.

    `progress`: keep what they print to stderr, where progress bars go.
    """
    debug = bool(os.environ.get("SDKIT_DEBUG"))
    with contextlib.ExitStack() as redirected:
        redirected.enter_context(contextlib.redirect_stdout(sys.stderr if debug else _NullWriter()))
        if not (progress or debug):
            redirected.enter_context(contextlib.redirect_stderr(_NullWriter()))
        yield


class _NullWriter:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
