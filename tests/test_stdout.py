"""What commands print: bars on a terminal, times in a log, the width that COLUMNS names."""

import io
import re

import pytest
from rich.console import Console

from sdkit.cli.checking import make_console
from sdkit.stdout import Phases, TimestampedStream


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


@pytest.mark.parametrize(("columns", "width"), [("72", 72), ("", 140), ("0", 140), ("wide", 140)])
def test_console_is_as_wide_as_columns_says(monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == width
    console = make_console(log=True)
    console.print("x" * (width - 9))
    assert re.fullmatch(r"\d\d:\d\d:\d\d x+\n", capsys.readouterr().out)
