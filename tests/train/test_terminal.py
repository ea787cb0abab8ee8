"""A run on a terminal: bars for every phase that lasts, printed lines that fit, and nothing left of the bars."""

import os
import pty
import re
import termios
import threading

import pytest
from rich.console import Console
from tinyruns import make_spec, train, training, with_evaluation

from sdkit.language.specs import OutputSpec
from sdkit.train.console_lines import LOG_LINE

WIDTH = 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
LINES_UP, CLEAR_LINE = re.compile(r"\x1b\[(\d*)A"), "\x1b[2K"


@pytest.fixture(scope="module")
def spec(tiny_folder):
    spec = make_spec(tiny_folder, training=training(steps=2), output=OutputSpec(trackers=(), checkpoint_every=1))
    return with_evaluation(spec, teacher_lift=0)


@pytest.fixture(scope="module")
def terminal(spec, tmp_path_factory):
    """What a run of two steps writes to a terminal of 80 columns."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, WIDTH))
    received = bytearray()

    def read():
        while True:
            try:
                received.extend(os.read(main, 65536))
            except OSError:  # the other side is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as stream:
        console = Console(file=stream, width=WIDTH)
        assert console.is_terminal
        train(spec, tmp_path_factory.mktemp("terminal") / "run", console)
    reader.join(60)
    os.close(main)
    return received.decode()


def screen(text):
    """The lines that remain: what the bars drew is erased line by line, upwards."""
    lines = [""]
    row = 0
    for token in re.split(r"(\x1b\[[0-9;?]*[a-zA-Z]|\r|\n)", text):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == CLEAR_LINE:
            lines[row] = ""
        elif up := LINES_UP.fullmatch(token):
            row -= int(up[1] or 1)
        elif token and token != "\r" and not token.startswith("\x1b"):
            lines[row] += token
    return [line.rstrip() for line in lines]


def test_every_phase_that_lasts_has_a_bar(terminal):
    drawn = CONTROL.sub("", terminal)
    for phase in ("loading data and models", "starting the rollout engine", "training", "rollouts", "updates"):
        assert re.search(rf"{phase} +[━╸╺]+", drawn), phase
    for phase in ("evaluation after step 0", "saving a checkpoint", "saving the model"):
        assert re.search(rf"{phase} +[━╸╺]+", drawn), phase
    assert re.search(r"training +[━╸╺]+ +\S+ 1/2, \d+ s left", drawn)


def test_bars_leave_no_trace(terminal):
    remaining = screen(terminal)
    assert not any(re.search(r"[━╸╺] +\d:\d\d:\d\d", line) for line in remaining)
    assert sum(line.startswith("step ") for line in remaining) == 2


def test_step_lines_use_the_width_of_the_terminal(terminal):
    steps = [line for line in screen(terminal) if line.startswith("step ")]
    assert all(LOG_LINE - 20 < len(line) <= WIDTH for line in steps)
    assert all(re.search(r" \d+/\d+ tok/s ", line) for line in steps)
