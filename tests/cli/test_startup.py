"""Checking and planning load no heavy module: a typing error must not cost the user seconds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "specs" / "sdft.yaml"
HEAVY = ("torch", "numpy", "transformers", "deepspeed", "vllm", "peft", "datasets", "matplotlib")


@pytest.mark.parametrize("command", ["validate", "show", "plan"])
def test_command_loads_no_heavy_module(command):
    code = (
        "import sys; from sdkit.cli import main\n"
        f"sys.argv = ['sdkit', {command!r}, {str(DEMO)!r}]\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []
