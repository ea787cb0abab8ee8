"""Plain data to specs and back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from golden import GOOD

from sdkit.language.errors import UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.overlay import load
from sdkit.language.resolved import canonical_hash, resolved
from sdkit.language.scalars import dump
from sdkit.language.specs import ExperimentSpec, LinearMix, Schedule, Table
from sdkit.language.structure import structure

EVERY_UNION = next(path for path in GOOD if path.stem == "every_union")


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_resolved_spec_loads_as_an_equal_one(path, tmp_path):
    checked = load_spec(path)
    again = tmp_path / path.name
    again.write_text(dump(resolved(checked.spec)), encoding="utf-8")
    spec, problems = structure(load(again))
    assert problems == []
    assert spec == checked.spec
    assert canonical_hash(spec) == canonical_hash(checked.spec)


def test_values_have_the_types_of_their_fields():
    spec = load_spec(EVERY_UNION).spec
    assert isinstance(spec, ExperimentSpec)
    assert spec.teacher
    assert spec.teacher.weights.update_rate == Schedule(start=0.1, to=0.01, steps=5, shape="cosine")
    assert type(spec.optimizer.lr) is float
    assert spec.optimizer.betas == (0.0, 0.5)
    assert spec.model.lora
    assert spec.model.lora.target_modules == ("q_proj", "v_proj")
    assert spec.model.chat_template_kwargs == Table({"enable_thinking": False, "budget": 3})
    assert spec.teacher.sees
    assert spec.teacher.sees.template == "{prompt} {demonstration}"


def test_resolved_spec_has_every_default_and_kind_first():
    data = resolved(load_spec(EVERY_UNION).spec)
    assert next(iter(data["losses"]["distil"])) == "kind"
    assert data["teacher"]["weights"]["update_rate"] == {"from": 0.1, "to": 0.01, "steps": 5, "shape": "cosine"}
    assert data["training"]["micro_batch_tokens"] == 8192
    assert resolved(LinearMix()) == {"kind": "linear_mix", "forward_share": 0.5}


def test_hash_is_the_same_in_every_process():
    code = f"from sdkit.language.load import load_spec; from sdkit.language.resolved import canonical_hash; print(canonical_hash(load_spec({str(EVERY_UNION)!r}).spec))"
    runs = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert runs == {canonical_hash(load_spec(EVERY_UNION).spec) + "\n"}


@pytest.mark.parametrize(
    ("text", "code"), [("", "type"), ("[1, 2]", "type"), ("text", "type"), ("3", "type"), ("{}", "missing_key")]
)
def test_file_without_a_map_is_one_problem(tmp_path, text, code):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    checked = load_spec(path)
    assert [p.code for p in checked.problems] == [code]
    assert checked.spec is None


def test_hostile_texts_never_raise(tmp_path):
    path = tmp_path / "x.yaml"
    for text in ("model: " + "[" * 10_000, "model: \0", "losses: &a {b: *a}", "\t", "model: {{}: {}}"):
        path.write_text(text)
        assert not load_spec(path).ok


def test_unreadable_file_raises(tmp_path):
    with pytest.raises(UnreadableInput):
        load_spec(tmp_path / "none.yaml")


def test_any_value_in_any_place_gives_problems_only(tmp_path):
    """Puts a value of each type at every written place of a spec; the result must be problems only."""
    base = load(EVERY_UNION)
    values = ("null", "true", "-1", "1.5", "x", "''", "[]", "[x]", "{}", "{x: 1}", "[[{}]]", "{kind: x}")
    paths = [".".join(map(str, path)) for path in base.nodes if path]
    for path in paths:
        for value in values:
            checked = load_spec(EVERY_UNION, [f"{path}={value}"])
            assert checked.spec is not None or checked.problems
            assert all(p.place for p in checked.problems)


def test_missing_method_page_hides_its_missing_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: none.yaml\nmodel: {path: x}\ndata: {source: {kind: hub, path: x}}\n"
        "optimizer: {lr: off}\ntraining: {prompts_per_step: 1}\n"
    )
    assert [p.code for p in load_spec(path).problems] == ["method_file", "type"]


def test_paths_can_be_relative_to_another_folder(tmp_path):
    spec = next(path for path in GOOD if path.stem == "data_path")
    moved = tmp_path / "resolved.yaml"
    moved.write_text(dump(resolved(load_spec(spec).spec)))
    assert not load_spec(moved).ok
    assert load_spec(moved, base=spec.parent).ok


def test_validation_loads_no_heavy_module():
    code = (
        "import sys; from sdkit.language.load import load_spec\n"
        f"checked = load_spec({str(EVERY_UNION)!r}); assert checked.ok\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'numpy', 'transformers', 'deepspeed', 'vllm', 'rich', 'typer')])"
    )
    assert ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True)) == []


def test_surface_matches_the_frozen_one():
    tool = Path(__file__).resolve().parents[2] / "tools/freeze_surface.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_keys_of_a_source_that_stand_beside_it_have_one_home(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: sdft\ndata:\n  kind: jsonl\n  path: rows.jsonl\n")
    hints = {p.path: p.hint for p in load_spec(path).problems}
    assert hints["data", "kind"] == "it belongs at data.source.kind"
    assert hints["data", "path"] == "it belongs at data.source.path"
