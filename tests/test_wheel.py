"""The wheel works outside a clone: installed into an environment of its own, from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Run the installed `sdkit` in an empty folder; its dependencies are those of the tests' environment."""
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
    # A folder on PYTHONPATH gives its packages but none of its .pth files, so not the clone that is installed there.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}

    def run(*words):
        command = [work / "env" / "bin" / "sdkit", *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_packaged_method_trains_two_steps(installed):
    assert "smoke run passed" in installed("smoke", "sdft")


def test_a_packaged_method_is_shown_from_the_environment(installed):
    origin = installed("show", "grpo").splitlines()[-1]
    assert "site-packages/sdkit/methods/grpo.yaml" in origin or "default" in origin
    assert "grpo: ok (method page)" in installed("validate", "grpo")
