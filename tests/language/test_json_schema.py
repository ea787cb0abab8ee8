"""The JSON Schema accepts what the language accepts, and refuses what it refuses for its shape."""

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
from golden import BAD, GOOD
from jsonschema import Draft202012Validator

from sdkit.language.json_schema import json_schema
from sdkit.language.load import load_spec
from sdkit.language.overlay import load
from sdkit.language.source import read, read_text
from sdkit.language.specs import Range, fields, run
from sdkit.language.structure import structure

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [*ROOT.glob("sdkit/methods/*.yaml"), *ROOT.glob("specs/**/*.yaml")]
IN_SCHEMA = {"number", "unknown_key", "missing_key", "kind", "choice", "type", "range"}
"""The codes of errors that a schema can express."""
EVERY_UNION = next(path for path in GOOD if path.stem == "every_union")
VALUES = ("null", "true", "-1", "1", "1.5", "1e30", "x", "''", "[]", "[x]", "{}", "{x: 1}", "[[{}]]", "{kind: x}")


@cache
def validator() -> Draft202012Validator:
    schema = json.loads(json.dumps(json_schema()))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", [*SHIPPED, *GOOD], ids=lambda p: p.stem)
def test_good_spec_validates(path):
    assert [error.message for error in validator().iter_errors(read(path).root.data)] == []


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_bad_spec_is_refused_if_its_shape_is_wrong(path):
    root = read(path).root
    if root is None or path.stem == "missing_key-misspelled":
        return  # no YAML, which editors report by themselves; or an entry that the page, which no schema reads, might have
    # An error in the method page that a run file names is the page's.
    wrong = {p.code for p in load_spec(path).problems if p.place.file == str(path)} & IN_SCHEMA
    assert validator().is_valid(root.data) == (not wrong)


PAGE_NAMED = {
    "losses: {distil: {divergence: jsd}}": True,
    "losses: {distil: {divergenc: jsd}}": False,
    "losses: {distil: {divergence: {teacher_share: 0.1}}}": True,
    "losses: {distil: {divergence: {kind: jsd, share: 0.1}}}": False,
    "losses: {distil: {divergence: {teacher_share: 1.0}}}": False,
    "losses: {distil: distillation}": True,
    "losses: {}": True,
    "teacher: {weights: {update_rate: {to: 0.1}}}": True,
    "teacher: {weights: {update_rate: {until: 0.1}}}": False,
    "teacher: null": True,
    "rollout: {keep: [{threshold: 1}]}": False,  # a list is replaced
}


RUN = """\
model: {path: m}
data: {source: {kind: inline, rows: [{q: a}]}, columns: {prompt: q}}
optimizer: {lr: 1e-3}
training: {steps: 1, prompts_per_step: 1}
"""


@pytest.mark.parametrize("part", PAGE_NAMED)
def test_run_file_may_override_parts_of_its_page(part):
    root = read_text(f"method: sdft\n{part}\n{RUN}", "run.yaml").root
    assert validator().is_valid(root.data) == PAGE_NAMED[part]


@pytest.mark.parametrize(("method", "known"), [("sdft", True), ("sdtf", False), ("./mine.yaml", True), ("", False)])
def test_method_is_a_packaged_page_or_a_path(method, known):
    errors = validator().iter_errors({"method": method})
    assert known == all("method" not in error.absolute_path for error in errors)


@pytest.mark.parametrize("first", range(2))
def test_value_of_any_type_in_any_place_is_judged_alike(first):
    """Puts a few values at each written place of a spec that has every union."""
    places = [".".join(map(str, path)) for path in load(EVERY_UNION).nodes if path]
    for place, value in itertools.islice(itertools.product(places, VALUES), first * 11, None, 23):
        mutant = load(EVERY_UNION, [f"{place}={value}"])
        if mutant.problems:
            continue
        problems = structure(mutant)[1]
        assert validator().is_valid(mutant.root.data) == (not problems), (place, value, problems)


SAMPLES = (
    0,
    1,
    8,
    -1,
    64,
    0.5,
    1.0,
    1e-7,
    1e-13,
    1e-17,
    2e6,
    -2e6,
    2e9,
    1e16,
    2**32,
    "",
    " ",
    "a",
    "a b",
    "a\n",
    "a\0",
)
SAMPLES += ("x" * 1001, "x" * 4001, "x" * 10_001, "ä\u2028", "bos_token", "messages", "a-b", "a1\n", "x" * 101)


def test_ranges_and_their_schemas_accept_the_same_values():
    ranges = {
        range.text: range for module in (fields, run) for range in vars(module).values() if isinstance(range, Range)
    }
    del ranges[fields.NOT_EMPTY.text]  # of lists and tables
    assert len(ranges) > 20
    for range in ranges.values():
        only_text = not range.ends
        for value in (v for v in SAMPLES if isinstance(v, str) == only_text):
            assert Draft202012Validator(range.schema).is_valid(value) == range.accepts(value), (range.text, value)
