"""The command line imports only the language until a command runs, so that `sdkit --help` and `validate` start fast.

`import sdkit` imports nothing, and its functions for specs, plans and runs need no torch.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdkit

CLI = Path(__file__).resolve().parents[2] / "sdkit" / "cli"
ALLOWED = ("sdkit.cli", "sdkit.devices", "sdkit.language", "sdkit.plan", "sdkit.stdout", "sdkit.__version__")


def top_level_imports(path):
    """Dotted names that importing the file imports directly."""
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
def test_commands_import_heavy_modules_inside_functions(path):
    imports = {name for name in top_level_imports(path) if name.startswith("sdkit")}
    assert {name for name in imports if not name.startswith(ALLOWED)} == set()


def loaded_by(code):
    """Names of the modules loaded after running the code in a process of its own."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_sdkit_loads_no_submodule():
    assert {name for name in loaded_by("import sdkit") if name.startswith("sdkit.")} == set()


def test_specs_and_plans_need_no_torch():
    loaded = loaded_by("import sdkit; sdkit.plan_spec(sdkit.load_spec('sdft')); sdkit.read_status; sdkit.SdkitError")
    assert "sdkit.api" in loaded
    assert loaded & {"torch", "numpy", "transformers", "deepspeed", "vllm"} == set()


def test_first_rows_are_checked_without_torch():
    loaded = loaded_by("import sdkit.train.first_row")
    assert loaded & {"torch", "numpy", "transformers", "datasets", "pyarrow"} == set()


def test_every_exported_name_can_be_imported():
    for name in sdkit.__all__:
        assert getattr(sdkit, name).__module__.startswith("sdkit.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sdkit.nothing  # noqa: B018
