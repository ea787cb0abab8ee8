"""Every shipped spec has no problem and no warning, and its plan is the frozen one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdkit.language.errors import render
from sdkit.language.load import load_spec
from sdkit.language.sequences import is_sequence

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
PAGES = sorted((ROOT / "sdkit" / "methods").glob("*.yaml"))


SINGLE = [path for path in sorted(SPECS.rglob("*.yaml")) if not is_sequence(path)]  # test_sequences.py has the others


@pytest.mark.parametrize("path", [*PAGES, *SINGLE], ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_spec_has_no_problem_and_no_warning(path):
    checked = load_spec(path)
    assert not checked.problems, render(checked.problems, checked.texts)
    assert checked.kind == ("method" if path.parent.name == "methods" else "run")


def test_names_of_run_files_are_unique():
    names = [p.stem for folder in (SPECS, SPECS / "papers") for p in folder.glob("*.yaml")]
    assert len(names) == len(set(names))


def test_run_file_must_name_the_teacher_of_its_page(tmp_path):
    """The problem is at the place of the page's placeholder."""
    page = ROOT / "sdkit" / "methods" / "gkd.yaml"
    run_keys = "\n".join(
        [
            "data: {source: {kind: inline, rows: [{q: a, demonstration: b}]}, columns: {prompt: q, demonstration: demonstration}}",
            "model: {path: bundled:smollm2-135m-instruct}",
            "optimizer: {lr: 1.0e-5}",
            "training: {steps: 1, prompts_per_step: 1}",
        ]
    )
    run = tmp_path / "run.yaml"
    run.write_text(f"method: {page}\n{run_keys}\n")
    (problem,) = load_spec(run).problems
    assert problem.code == "teacher_model"
    assert problem.place.file == str(page)
    assert "there is no folder ./name-it-in-the-run-file" in problem.message
    named = load_spec(run, ["teacher.weights.path=bundled:smollm2-135m-instruct"])
    assert named.ok, named.problems


def test_every_method_page_is_listed_in_the_docs():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    pages = {f"../sdkit/methods/{path.name}" for path in PAGES}
    assert {page for page in pages if f"({page})" not in text} == set()


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_links_between_pages_exist(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_plans_match_the_frozen_ones():
    tool = ROOT / "tools" / "freeze_plans.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
