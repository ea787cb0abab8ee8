"""What commands print: bars on a terminal, times in a log, the width that COLUMNS names."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import Task, TaskID

from sdkit.cli.checking import make_console
from sdkit.stdout import Phases, TimestampedStream, _time_left, readable_duration


def test_every_line_of_a_log_has_the_time():
    log = io.StringIO()
    stream = TimestampedStream(log)
    for text in ("one\ntw", "o\n", "\n", "three"):
        stream.write(text)
    lines = log.getvalue().split("\n")
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == ["one", "two", "", "three"]


def test_log_names_a_phase_and_leaves_out_parts():
    console = Console(file=io.StringIO(), width=40)
    phases = Phases(console)
    with phases.phase("loading"), phases.phase("updates", 2, log=False) as advance:
        advance(1)
    assert console.file.getvalue() == "loading …\n"


def test_terminal_shows_phases_while_they_last():
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    phases = Phases(console)
    with phases.phase("training", 3, done=1, log=False) as advance, phases.phase("loading"):
        advance(1)
        assert [(task.description, task.completed) for task in phases._bars.tasks] == [("training", 2), ("loading", 0)]
    assert phases._bars.tasks == []
    assert not phases._bars.live.is_started
    text = console.file.getvalue()
    assert "training" in text
    assert "loading …" not in text


def test_phase_ends_with_an_error():
    phases = Phases(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyboardInterrupt), phases.phase("loading"):
        raise KeyboardInterrupt
    assert not phases._bars.live.is_started


def test_bar_shows_parts_and_the_time_that_is_left():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    phases = Phases(console)
    with phases.phase("training", 120, done=20, time_left=lambda: 5400.0) as advance, phases.phase("loading"):
        advance(2.6)
        phases._bars.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"training +[━╸╺]+ +0:00:00 23/120, 90 min left", text)
    assert re.search(r"loading +[━╸╺]+ +0:00:00 *[\r\n]", text)


def test_time_left_follows_from_the_parts_done():
    task = Task(
        TaskID(0), "updates", total=8, completed=4, _get_time=lambda: 30.0, fields={"done": 1, "time_left": None}
    )
    task.start_time = 0.0
    assert _time_left(task) == 30 / 3 * 4
    task.completed = 1
    assert _time_left(task) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5400, "90 min"),
        (7200, "2 h"),
        (12000, "3 h 20 min"),
        (190800, "2 d 5 h"),
    ],
)
def test_duration_is_readable(seconds, text):
    assert readable_duration(seconds) == text


@pytest.mark.parametrize(("columns", "width"), [("72", 72), ("", 140), ("0", 140), ("wide", 140)])
def test_console_is_as_wide_as_columns_says(monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == width
    console = make_console(log=True)
    console.print("x" * (width - 9))
    assert re.fullmatch(r"\d\d:\d\d:\d\d x+\n", capsys.readouterr().out)
