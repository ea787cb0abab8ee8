"""No method's name is an identifier of sdkit, or a string that its code could compare: a method is a page of YAML."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sdkit").rglob("*.py"))

FIXED = {
    *("sdft", "sdpo", "opsd", "opcd", "opd", "grpo", "drgrpo", "gspo", "dapo", "srpo", "rlsd"),
    *(
        "crisp",
        "gkd",
        "minillm",
        "eopd",
        "pwopsd",
        "reopold",
        "cispo",
        "ppo",
        "dpo",
        "mopd",
        "exopd",
        "iwopd",
        "opsdc",
        "kdrl",
        "sdpg",
        "ssd",
        "rft",
        "sft",
        "seqkd",
    ),
}
WORDS = {"echo"}
"""Names of pages that are words of a library too: Typer prints with `echo`."""
NAMES = (FIXED | {path.stem for path in (ROOT / "sdkit/methods").glob("*.yaml")}) - WORDS


def _words(identifier: str) -> set[str]:
    """The identifier and its parts: `open_sdft` and `OpenSdft` hold sdft."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower()
    return {identifier.lower(), *parts.split("_")}


def _docstrings(tree: ast.AST) -> set[int]:
    """Ids of strings that are statements: docstrings of modules, classes, functions and constants."""
    expressions = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {id(e.value) for e in expressions if isinstance(e.value, ast.Constant)}


def _mentions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    skipped = _docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in skipped and node.value.strip().lower() in NAMES:
                yield line, node.value
            continue
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str) and _words(value.replace(".", "_")) & NAMES:
                yield line, value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "sdkit")))
def test_code_names_no_method(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(_mentions(tree)) == []


def test_mentions_of_methods_are_detected():
    for code in ("open_sdft()", "x = 'SDPO'", "class GrpoLoss: pass", "import x.dapo", "f(gkd=1)"):
        assert list(_mentions(ast.parse(code))), code
    for code in ("'''sdft'''", "x = 'specs/sdft.yaml'", "x = 'on-policy, as SDFT does'"):
        assert not list(_mentions(ast.parse(code))), code
