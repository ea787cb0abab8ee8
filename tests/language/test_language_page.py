"""Parts of specs are shown without their defaults in docs/language.md; they load as the same specs."""

from pathlib import Path

import pytest

from sdkit.language.load import load_spec
from sdkit.language.resolved import without_defaults
from sdkit.language.scalars import compact

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sdkit/methods", "specs", "specs/papers", "tests/ok")


@pytest.mark.parametrize("folder", FOLDERS)
def test_specs_without_defaults_load_as_the_same_specs(folder, tmp_path):
    files = sorted((ROOT / folder).glob("*.yaml"))
    assert files
    for file in files:
        checked = load_spec(file)
        short = tmp_path / file.name
        short.write_text(compact(without_defaults(checked.spec, type(checked.spec))), encoding="utf-8")
        assert load_spec(short, base=file.parent).spec == checked.spec, file
