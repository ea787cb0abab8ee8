"""Docstrings, comments and pages name only files of the repository that exist."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "broken.py"  # a syntax error on purpose
FOLDERS = ("sdkit", "tools", "tests", "docs", "specs")
SOURCES = sorted(
    path for folder in ("sdkit", "tools", "tests") for path in (ROOT / folder).rglob("*.py") if path.name != BROKEN
)
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
FILES = [path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.*")]
FILES += [path.relative_to(ROOT) for path in ROOT.iterdir()]
ENDINGS = {"/".join(file.parts[i:]) for file in FILES for i in range(len(file.parts))}
"""Every file's path, and the ends of the path by which prose may name it."""

CITED = re.compile(r"[\w./-]+\.(?:py|md|yaml|toml)\b")
IN_FOLDERS = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|yaml)\b")
ELSEWHERE = {"spec.yaml", "resolved.yaml", "completions.md", "CODE-variant.yaml", "FILE.py"}
"""Files of a run directory and of an evaluation, and patterns."""
EXAMPLES = {"sdkit/methods/mine.yaml", "sdkit/methods/NAME.yaml", "specs/broken.yaml", "specs/mine.yaml"}
"""Names that stand for others, or for files that a reader writes."""


def _prose(source: str) -> Iterator[str]:
    """Docstrings, strings that stand alone (of attributes), and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def _missing(names: set[str]) -> set[str]:
    return {name for name in names if name.lstrip("./") not in ENDINGS}


def test_docstrings_and_comments_cite_existing_files():
    missing = {}
    for path in SOURCES:
        cited = {name for text in _prose(path.read_text("utf-8")) for name in CITED.findall(text)}
        missing[str(path.relative_to(ROOT))] = _missing(cited - ELSEWHERE)
    assert {path: names for path, names in missing.items() if names} == {}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_cite_existing_files(path):
    assert _missing(set(IN_FOLDERS.findall(path.read_text("utf-8"))) - EXAMPLES) == set()


def test_missing_file_is_noticed():
    assert _missing({"train/step.py", "train/stepp.py", "nowhere.md"}) == {"train/stepp.py", "nowhere.md"}
