"""The wheel works outside a clone: installed in its own environment, run from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run_installed(tmp_path_factory):
    """Runs the installed `sdkit` in an empty folder; its dependencies are those of the tests' environment."""
    work = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", work / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = (work / "dist").glob("*.whl")
    venv.create(work / "env", with_pip=True)
    python = work / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    empty = work / "empty"
    empty.mkdir()
    # A folder on PYTHONPATH offers its packages but not its .pth files, hence not the clone installed there.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}

    def run(*arguments):
        command = [work / "env" / "bin" / "sdkit", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_packaged_method_trains_two_steps(run_installed):
    assert "smoke run passed" in run_installed("smoke", "sdft")


def test_packaged_method_is_read_from_the_environment(run_installed):
    origin = run_installed("show", "grpo").splitlines()[-1]
    assert "site-packages/sdkit/methods/grpo.yaml" in origin or "default" in origin
    assert "grpo: ok (method page)" in run_installed("validate", "grpo")


def test_examples_of_explanations_are_installed(run_installed):
    assert "Keeps it:" in run_installed("explain", "no_teacher")
    assert "example, from" in run_installed("explain", "update_rate")
