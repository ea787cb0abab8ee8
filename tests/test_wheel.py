"""The wheel works outside a clone: installed in its own environment, run from an empty folder.  Wheel and sdist are fit
for a package index.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

import sdkit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def run_installed(tmp_path_factory, dist):
    """Runs the installed `sdkit` in an empty folder; its dependencies are those of the tests' environment."""
    work = tmp_path_factory.mktemp("wheel")
    [wheel] = dist.glob("*.whl")
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


def test_wheel_and_sdist_are_fit_for_an_index(dist):
    files = sorted(dist.iterdir())
    assert [path.name.rpartition(".")[2] for path in files] == ["whl", "gz"]
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_sdist_has_the_license_and_the_sources_of_the_tests(dist):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "SECURITY.md",
        "tests/test_wheel.py",
        "specs/sdft.yaml",
    } <= names
    assert not any(name.startswith((".venv", "runs/", "dist/", "site/")) for name in names)


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (sdkit.__version__, "Apache-2.0")
    assert f"## {sdkit.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
