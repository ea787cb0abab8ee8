"""The golden error texts: each tests/err/CODE[-variant].yaml beside what sdkit prints for it.

`python tests/support/golden.py` rewrites them; read the diff.
"""

import os
from pathlib import Path

from attrs import evolve

from sdkit.data.first_row import check_first_rows
from sdkit.language import panel
from sdkit.language.errors import render
from sdkit.language.load import CheckedSpec, load_spec

TESTS = Path(__file__).resolve().parent.parent
BAD = sorted((TESTS / "err").glob("*.yaml"))
GOOD = sorted((TESTS / "ok").glob("*.yaml"))


def validated(path: Path) -> CheckedSpec:
    """The spec with the problems that `sdkit validate` prints, run from its folder."""
    before, is_installed = Path.cwd(), panel.is_installed
    os.chdir(path.parent)
    panel.is_installed = lambda package: True  # which extras are there must not change the texts
    try:
        checked = load_spec(path.name)
        return evolve(checked, problems=(*checked.problems, *check_first_rows(checked).problems))
    finally:
        os.chdir(before)
        panel.is_installed = is_installed


def validate_output(path: Path) -> str:
    """What `sdkit validate` prints for a spec, run from its folder."""
    checked = validated(path)
    text = render(checked.problems, checked.texts)
    return text + "\n" if text else ""


if __name__ == "__main__":
    for spec in BAD:
        spec.with_suffix(".out").write_text(validate_output(spec), encoding="utf-8")
