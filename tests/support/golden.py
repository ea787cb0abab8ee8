"""The golden error texts: each tests/err/CODE[-variant].yaml beside what sdkit prints for it.

`python tests/support/golden.py` rewrites them; read the diff.
"""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

from attrs import evolve

from sdkit.language import panel
from sdkit.language.errors import render
from sdkit.language.load import CheckedSpec, load_spec
from sdkit.language.sequences import CheckedSequence, load_sequence
from sdkit.train.first_row import check_first_rows

TESTS = Path(__file__).resolve().parent.parent
BAD = sorted((TESTS / "err").glob("*.yaml"))
BAD_SEQUENCES = sorted((TESTS / "err" / "sequences").glob("*.yaml"))
GOOD = sorted((TESTS / "ok").glob("*.yaml"))


def validated(path: Path) -> CheckedSpec | CheckedSequence:
    """The spec or sequence file with what `sdkit validate` prints, run from its folder without the trackers' packages."""
    with (
        contextlib.chdir(path.parent),
        patch.object(panel, "is_installed", lambda package: True),  # which extras are there must not change the texts
        patch.dict(sys.modules, wandb=None, trackio=None),
    ):
        return load_sequence(path.name) if path in BAD_SEQUENCES else _validated(path.name)


def _validated(name: str) -> CheckedSpec:
    checked = load_spec(name)
    return evolve(checked, problems=(*checked.problems, *check_first_rows(checked).problems))


def validate_output(path: Path) -> str:
    """What `sdkit validate` prints for a spec, run from its folder."""
    checked = validated(path)
    text = render(checked.problems, checked.texts)
    return text + "\n" if text else ""


if __name__ == "__main__":
    for spec in (*BAD, *BAD_SEQUENCES):
        spec.with_suffix(".out").write_text(validate_output(spec), encoding="utf-8")
