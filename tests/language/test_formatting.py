"""`sdkit fmt`: keys in the language's order, current names, plain numbers; comments stay and the spec is the same."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from golden import BAD, GOOD

from sdkit.language.errors import UnreadableInput
from sdkit.language.formatting import format_spec
from sdkit.language.introspection import keys_of
from sdkit.language.load import load_spec
from sdkit.language.resolved import resolved
from sdkit.language.source import read_text
from sdkit.language.specs import SequenceSpec

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*ROOT.glob("specs/**/*.yaml"), *ROOT.glob("sdkit/methods/*.yaml")])


def formatted(path, text):
    path.write_text(text)
    source, after = format_spec(path)
    assert source.text == text
    path.write_text(after)
    assert format_spec(path)[1] == after, "formatting twice changes more"
    return after


@pytest.fixture
def fmt(tmp_path):
    return lambda text: formatted(tmp_path / "spec.yaml", text)


def in_order(spec):
    """The spec with its tables in order, which `==` ignores."""
    return json.dumps(resolved(spec))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_specs_are_formatted(path):
    source, after = format_spec(path)
    assert after == source.text


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_no_line_is_lost_and_the_spec_is_the_same(path, tmp_path):
    source, after = format_spec(path)
    written = re.sub(r"\b(\d+)e-", r"\1.0e-", source.text)  # numbers as every parser reads them
    assert sorted("".join(after.split())) == sorted("".join(written.split()))
    copy = path.with_name(".formatted.yaml")  # beside the files that the spec names
    try:
        copy.write_text(after)
        assert in_order(load_spec(copy).spec) == in_order(load_spec(path).spec)
    finally:
        copy.unlink()


def shuffled(data, draw):
    if isinstance(data, list):
        return [shuffled(item, draw) for item in data]
    if not isinstance(data, dict):
        return data
    return {name: shuffled(value, draw) for name, value in draw.sample(list(data.items()), len(data))}


@pytest.mark.parametrize("path", SHIPPED[::3], ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.parametrize("flow", [False, None, True])
def test_any_order_and_layout_comes_out_the_same(path, flow, tmp_path):
    draw = random.Random(path.stem)
    data = shuffled(read_text(path.read_text(), path.name).data, draw)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=flow, width=draw.choice([40, 1000]))
    copy = tmp_path / "copy.yaml"
    after = formatted(copy, text)
    copy.write_text(text)
    before = load_spec(copy)
    copy.write_text(after)
    checked = load_spec(copy)
    assert in_order(checked.spec) == in_order(before.spec) if before.spec else checked.spec is None
    names = list(read_text(after, "after").data)
    order = ["method", "model", "data", "rollout", "teacher", "losses", "route", "rewards", "reward", "evaluation"]
    order += ["environment", "optimizer", "training", "machine", "output", *keys_of(SequenceSpec)]
    assert names == [name for name in order if name in names]


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_spec_with_errors_keeps_them(path):
    source, after = format_spec(path)
    if source.problems:
        assert after == source.text
    else:
        assert read_text(after, "after").data == read_text(source.text, "before", resolved=True).data


def test_comments_move_with_their_keys_and_blank_lines_stay(fmt):
    before = """\
# The header.
optimizer:
  # Warm-up:
  # long.
  warmup_steps: 10 # behind
  # The rate.
  lr: 1e-5 # beside
  # at the end

# About the model.
model: # the student
    # deep
  path: gpt2

# on its own

method: sft
"""
    assert (
        fmt(before)
        == """\
# The header.
method: sft

# About the model.
model: # the student
    # deep
  path: gpt2

# on its own

optimizer:
  # The rate.
  lr: 1.0e-5 # beside
  # Warm-up:
  # long.
  warmup_steps: 10 # behind
  # at the end
"""
    )


def test_lists_flow_maps_and_block_texts(fmt):
    before = """\
teacher:
  sees:
    turns:
      - assistant: "# no comment"   # the answer
        user: |
          {prompt}
          # text
      - {assistant: "{b}", user: "{a}"}
    kind: earlier_turns
    slots: {a: {name: x, kind: column}, b: {text: t,
        kind: text}}
  weights: {update_rate: .5, kind: ema}"""
    assert (
        fmt(before)
        == """\
teacher:
  weights: {kind: ema, update_rate: 0.5}
  sees:
    kind: earlier_turns
    turns:
      - user: |
          {prompt}
          # text
        assistant: "# no comment"   # the answer
      - {user: "{a}", assistant: "{b}"}
    slots: {a: {kind: column, name: x}, b: {kind: text,
        text: t}}
"""
    )


def test_old_names_become_current_ones(fmt):
    before = (
        "optimizer: {schedule: cosine, clip: 1, lr: 1E5}\nmodel: {lora: {targets: all_linear, rank: 8}, path: a}\n"
    )
    after = "model: {path: a, lora: {r: 8, target_modules: all-linear}}\noptimizer: {lr: 1.0e+5, max_grad_norm: 1, lr_scheduler_type: cosine}\n"
    assert fmt(before) == after


@pytest.mark.parametrize(("old", "new"), [("false", "[]"), ("true", "[tensorboard]")])
def test_old_value_becomes_the_current_one(fmt, old, new):
    assert fmt(f"output: {{tensorboard: {old}}}\n") == f"output: {{trackers: {new}}}\n"


def test_tables_keep_their_order(fmt):
    text = "losses:\n  b: {kind: cross_entropy}\n  a: {kind: cross_entropy}\n"
    assert fmt(text) == text


def test_an_alias_stays_behind_its_anchor(fmt):
    text = "optimizer: {lr: &x 1.0e-5}\nmodel: {path: a}\ndata: {limit: *x}\n"
    assert fmt(text) == text


def test_line_ends_of_windows_stay(fmt):
    assert fmt("model: {path: a}\r\nmethod: sft\r\n") == "method: sft\r\nmodel: {path: a}\r\n"


def test_a_key_with_a_question_mark_stays_or_is_refused(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("training:\n  ? prompts_per_step\n  : 5\n  steps: 3\n")
    with pytest.raises(UnreadableInput, match="it is left as it is"):
        format_spec(path)
