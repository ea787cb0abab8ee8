"""Runs the code blocks of a page of documentation, in order, and compares what they print with the page.

A page has four kinds of fenced blocks:

- a block with a `title` is a file: it is written to the working folder under that name,
- each line of `sh` is a command, run in a process of its own; the command `sdkit` is this clone's, and its output may go
  to a file with `>`,
- `python` is run in one namespace for all blocks of the page,
- `text` is what the block before it prints; a line `…` stands for any lines.

An HTML comment on the line before a block changes how it is treated: `<!-- exit 1 -->` names the exit code of `sh`
(default 0), `<!-- exit 7, Ctrl-C after TEXT -->` also presses Ctrl-C once the command has printed the text,
`<!-- figures vary -->` compares the text without numbers and sampled answers, and `<!-- not run -->` skips
the block.
"""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from warm import WarmProcess

FENCE = re.compile(
    r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<info>\w+[^\n]*)\n(?P<body>.*?)```$", re.DOTALL | re.MULTILINE
)
EXIT = re.compile(r"exit (?P<code>\d+)(?:, Ctrl-C after (?P<text>.+))?")
NUMBER = re.compile(r"[-+−]?\d+(,\d{3})*(\.\d+)?(e[-+]\d+)?")
SECONDS = re.compile(r"\d+(\.\d+)? s\b")
STEP = re.compile(r"(?m)^(step \d+/\d+  loss \S+  grad \S+).*$")
"""A step's line: which figures follow the gradient depends on the room that rates and times leave."""
TIME_OF_DAY = re.compile(r"(?m)^\d\d:\d\d:\d\d ")
"""The start of a line in a log, which a terminal does not show."""


class Block(NamedTuple):
    kind: str  # the language of the fence, or `file`
    title: str
    body: str
    note: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    parsed = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["info"])
        kind = "file" if title else match["info"].split()[0]
        line = text[: match.start()].count("\n") + 1
        parsed.append(Block(kind, title[1] if title else "", match["body"], match["note"] or "", line))
    return parsed


def run_page(page: Path, folder: Path, warm: WarmProcess) -> None:
    """Run every block of the page in `folder`.  Raises AssertionError, which names the line of the block."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    with contextlib.chdir(folder):
        for block in blocks(page):
            place = f"{page.name}:{block.line}"
            match block.kind:
                case _ if block.note == "not run":
                    continue
                case "file":
                    Path(block.title).write_text(block.body, encoding="utf-8")
                case "sh":
                    printed = run_shell(block, folder, place, warm)
                case "python":
                    output = io.StringIO()
                    with contextlib.redirect_stdout(output):
                        exec(compile("\n" * block.line + block.body, str(page), "exec"), namespace)
                    printed = output.getvalue()
                case "text":
                    varies = block.note == "figures vary"
                    expected, actual = normal(block.body, folder, varies), normal(printed, folder, varies)
                    assert matches(expected, actual), f"{place}: printed\n{printed}\ninstead of\n{block.body}"


def run_shell(block: Block, folder: Path, place: str, warm: WarmProcess) -> str:
    """Run the commands until one fails; returns what they print on both streams."""
    note = EXIT.fullmatch(block.note)
    expected, interrupt_after = (int(note["code"]), note["text"]) if note else (0, None)
    printed, code = "", 0
    for line in block.body.splitlines():
        command, *words = shlex.split(line)
        target = words.pop() if ">" in words[-2:-1] else None
        if command == "sdkit":
            words = words[: -1 if target else None]
            done = warm.run(
                "-m", "sdkit", *words, cwd=folder, merged=True, timeout=900, interrupt_after=interrupt_after
            )
        else:
            done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True, timeout=900)
        if target:
            Path(target).write_text(done.stdout, encoding="utf-8")
        else:
            printed += done.stdout
        code = done.returncode
        if code:
            break
    assert code == expected, f"{place}: exit code {code}\n{printed}"
    return printed


def normal(text: str, folder: Path, varies: bool) -> list[str]:
    """The lines without times, folders, widths and, if figures vary, numbers."""
    text = SECONDS.sub("#", STEP.sub(r"\1", TIME_OF_DAY.sub("", text)).replace(str(folder), "FOLDER"))
    if varies:
        text = re.sub(r"(?m)^  sample: .*", "  sample:", NUMBER.sub("#", text))
    text = re.sub(r"[─━═]+", "─", text)
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def matches(expected: list[str], actual: list[str]) -> bool:
    """Whether the lines are equal; `…` in `expected` stands for any lines."""
    if not expected:
        return not actual
    if expected[0] == "…":
        return any(matches(expected[1:], actual[i:]) for i in range(len(actual) + 1))
    return bool(actual) and expected[0] == actual[0] and matches(expected[1:], actual[1:])
