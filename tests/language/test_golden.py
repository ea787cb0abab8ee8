"""Every problem code has a bad example with its exact output, and every rule a good example without problems."""

import subprocess
import sys
from pathlib import Path

import pytest
from golden import BAD, GOOD, TESTS, validate_output, validated

from sdkit.language.rules import RULES
from sdkit.language.shape_codes import SHAPE_CODES

SEVERAL = {"seven"}
"""Files with more than one problem."""


def _code(path: Path) -> str:
    return path.stem.split("-")[0]


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_bad_spec_prints_its_golden_text(path):
    assert validate_output(path) == path.with_suffix(".out").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in BAD if p.stem not in SEVERAL], ids=lambda p: p.stem)
def test_bad_spec_has_exactly_its_code(path):
    checked = validated(path)
    assert {p.code for p in checked.problems} == {_code(path)}
    severities = {rule.code: rule.severity for rule in RULES}
    assert {p.severity for p in checked.problems} == {severities.get(_code(path), "error")}
    assert checked.ok == all(p.severity == "warning" for p in checked.problems)


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_good_spec_has_no_problem(path):
    checked = validated(path)
    assert checked.ok
    assert checked.spec is not None
    assert bool(checked.problems) == path.stem.endswith("_warns"), validate_output(path)


def test_every_rule_has_examples_and_a_reason():
    codes = {rule.code for rule in RULES}
    assert codes <= {_code(path) for path in BAD}
    assert codes <= {_code(path) for path in GOOD}
    assert [rule.code for rule in RULES if not rule.reason or not rule.summary] == []
    assert len(codes) == len(RULES)


def test_rules_page_is_up_to_date():
    tool = TESTS.parent / "tools/freeze_rules.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_code_outside_the_rules_has_a_bad_example():
    # Overrides are not in a file: test_overlay.py tests them.
    assert SHAPE_CODES.keys() - {"override"} <= {_code(path) for path in BAD}
    assert not SHAPE_CODES.keys() & {rule.code for rule in RULES}


def test_messages_follow_the_style():
    for path in BAD:
        for problem in validated(path).problems:
            text = problem.message
            assert "\n" not in text
            assert not text.endswith(".")
            assert text[0] in "'.*{" or not text[0].isupper(), text
            assert not any(word in text for word in ("NoneType", "Traceback", "<class", "dict"))
            assert problem.place is not None
            assert problem.place.line > 0


def test_problems_of_one_file_are_shown_together():
    text = next(path for path in BAD if path.stem == "seven").with_suffix(".out").read_text()
    codes = [line.rsplit("[", 1)[1].rstrip("]") for line in text.splitlines() if line[-1] == "]"]
    assert codes == ["unknown_key", "kind", "type", "choice", "type", "type", "duplicate_key"]
