"""The import floors: which module may import which, read from the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sdkit").rglob("*.py"))

LANGUAGE = {
    *(
        "specs",
        "problems",
        "reading",
        "scalars",
        "source",
        "overlay",
        "surface",
        "structure",
        "wording",
    ),
    *("resolved", "rules", "templates", "bundled", "language", "show", "seeds"),
    *(
        "plan",
        "plan_text",
        "plan_memory",
        "plan_time",
        "accelerators",
        "objective_text",
        "machine",
        "measures",
        "functions",
        "schedules",
    ),
    *("vocabulary", "teacher_text", "shapes", "metric_names", "texts"),
}
"""Floor 0."""
NOUNS = {"batches", "logits", "weights"}
"""Floor 1."""
LIGHT = {"attrs", "yaml"}
ENGINE_ONLY = {"sdkit.engine", "sdkit.cli", "deepspeed", "typer"}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, only_top: bool = False) -> set[str]:
    """Dotted names of what a file imports; at any depth, or only what importing the file itself brings in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (only_top and (lazy or typing_only)):
            pending += ast.iter_child_nodes(node)
    return found


def _outside(imports: set[str]) -> set[str]:
    """Top-level packages that are neither sdkit nor the standard library."""
    tops = {name.split(".")[0] for name in imports}
    return tops - {"sdkit"} - sys.stdlib_module_names


def _rooms(imports: set[str]) -> set[str]:
    """The rooms of sdkit that are imported: `specs`, `losses`, …"""
    return {name.split(".")[1] for name in imports if name.startswith("sdkit.")} - {"__version__"}


def _room(path: Path) -> str:
    return ([*_name(path).split("."), ""])[1]


FLOORS = [
    # rooms, rooms that they may import, packages that they may import
    (LANGUAGE, LANGUAGE, LIGHT),
    (NOUNS, LANGUAGE | NOUNS, {"attrs", "torch", "peft"}),
    ({"losses"}, {"losses", "specs", "batches", "schedules"}, {"attrs", "torch"}),
]


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_lower_floors_import_no_higher_ones(path):
    imports = _imports(path)
    for rooms, may_use, packages in FLOORS:
        if _room(path) in rooms:
            assert _rooms(imports) <= may_use
            assert _outside(imports) <= packages


def test_every_file_stands_on_a_floor():
    known = LANGUAGE | NOUNS | {"", "losses", "components", "engine", "cli", "__main__"}
    assert {_room(path) for path in FILES} <= known


@pytest.mark.parametrize(
    "path", [p for p in FILES if _room(p) == "components"], ids=lambda p: p.stem
)
def test_components_know_neither_the_engine_nor_each_other(path):
    imports = _imports(path)
    assert not {i for i in imports if i.startswith(tuple(ENGINE_ONLY))}
    own = path.stem.split("_")[0]
    siblings = {i.split(".")[2] for i in imports if i.startswith("sdkit.components.")}
    assert {s for s in siblings if s.split("_")[0] != own} == set()


@pytest.mark.parametrize(
    ("package", "files"),
    [
        (
            "deepspeed",
            {f"sdkit.engine.{name}" for name in ("zero", "zero_shards", "zero_universal")},
        ),
        ("vllm", {"sdkit.components.vllm", "sdkit.components.vllm_worker"}),
        ("typer", {_name(p) for p in FILES if _room(p) == "cli"}),
    ],
)
def test_one_room_knows_each_of_the_large_libraries(package, files):
    users = {_name(p) for p in FILES if package in {i.split(".")[0] for i in _imports(p)}}
    assert users <= files


@pytest.mark.parametrize("path", [p for p in FILES if _room(p) == "cli"], ids=lambda p: p.stem)
def test_the_door_imports_only_the_language_until_a_command_runs(path):
    imports = _imports(path, only_top=True)
    assert _rooms(imports) <= LANGUAGE | {"cli"}
    assert _outside(imports) <= {"typer", "rich"}


def test_nothing_imports_the_door():
    for path in FILES:
        if _room(path) not in ("cli", "__main__"):
            assert not {i for i in _imports(path) if i.startswith("sdkit.cli")}, path
