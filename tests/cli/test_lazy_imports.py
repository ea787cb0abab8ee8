"""The command line imports only the language until a command runs, so that `sdkit --help` and `validate` start fast."""

import ast
from pathlib import Path

import pytest

CLI = Path(__file__).resolve().parents[2] / "sdkit" / "cli"
ALLOWED = ("sdkit.cli", "sdkit.language", "sdkit.plan", "sdkit.__version__")


def top_level_imports(path):
    """Dotted names of what importing the file itself brings in."""
    pending, names = list(ast.parse(path.read_text(encoding="utf-8")).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not isinstance(node, ast.FunctionDef | ast.Lambda) and not typing_only:
            pending += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_heavy_imports_stand_inside_the_commands(path):
    imports = {name for name in top_level_imports(path) if name.startswith("sdkit")}
    assert {name for name in imports if not name.startswith(ALLOWED)} == set()
