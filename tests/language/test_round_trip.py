"""Text → spec → text is the identity: the output of `sdkit show` and a run's resolved.yaml read back as the same spec."""

import random
import re

import pytest
from golden import GOOD

from sdkit.language.files import MAX_SPEC_BYTES
from sdkit.language.load import load_spec
from sdkit.language.scalars import dump
from sdkit.language.show import _key, _text, annotated
from sdkit.language.source import read_text

NASTY = (
    *("true", "null", "Null", "~", "yes", "no", "1e5", "0x1F", "0o7", ".5", "-", "=", "<<", "1_0", "12:30", "2026-01-01"),
    *("", " ", "#", " #x", "a: b", "- a", "*a", "&a", "!a", "%a", "@a", "`a", "'", '"', "\\", "{}", "[]", "|", ">", "?", ","),
    *("\x85", "\u2028", "\u2029", "\ufeff", "\ufffe", "\uffff", "\x7f", "\x80", "\x9f", "\xa0", "\xad", "\u200b", "\u202e"),
    *("\0", "\x01", "\x08", "\x0b", "\x0c", "\x1b", "\t", "\n", "\r", "\r\n", "\n\n", " \n "),
    *("\ue000", "\ud7ff", "\U0001f600", "\U0001fffe", "\U0010ffff", "é", "e\u0301", "中", "x" * 99, "\u2028" * 33),
)  # fmt: skip


def nasty(draw):
    return "".join(draw.choices(NASTY, k=draw.randint(0, 4)))


def number(draw):
    return draw.choice([0, -1, 10**38, -(10**38), 2**63, 1e300, -1e-300, 5e-324, 1e22, 0.1, -0.0, 1e16, draw.random(), draw.getrandbits(64)])  # fmt: skip


def value(draw, depth=0):
    """Returns a random value of a data row."""
    kind = draw.randrange(7 if depth < 5 else 4)
    if kind < 2:
        return nasty(draw)
    if kind < 4:
        return draw.choice([None, True, False, number(draw)])
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {nasty(draw)[:100]: value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def braces(text):
    return text.replace("{", "{{").replace("}", "}}")


def spec_data(draw):
    """Returns the data of a run file with difficult strings and numbers wherever it takes user data."""
    columns = {nasty(draw).strip()[:80] + "x": nasty(draw)[:80] + "q" for _ in range(3)}
    columns = {a: b for a, b in columns.items() if a.isprintable() and b.isprintable()}
    rows = [{"q": "x", "d": "y"} | dict.fromkeys(columns.values(), "z") | {"v": value(draw)} for _ in range(3)]
    text = braces(nasty(draw)) + "{prompt} {d}" + braces(nasty(draw))
    return {
        "model": {"path": "hub/model", "chat_template_kwargs": {"true": nasty(draw), "n": draw.choice([1, 0.5, False])}},
        "data": {"source": {"kind": "inline", "rows": rows}, "columns": {"prompt": "q", "d": {"template": braces(nasty(draw)) + "{d}"}, **columns}},
        "rollout": {"sampled_by": {"kind": "dataset", "column": "d"}, "stop": [nasty(draw) + "s"]},
        "teacher": {"weights": "frozen", "sees": {"template": text, "slots": {"d": {"kind": "text", "text": nasty(draw) + "t"}}}},
        "losses": {draw.choice(["true", "null", "no", "e5", "_"]): {"kind": "distillation", "divergence": "forward_kl", "support": "vocabulary"}},
        "rewards": {"r": {"kind": "regex", "pattern": "x"}, "null": {"kind": "weighted", "parts": {"r": draw.uniform(1e-9, 1e6)}}},
        "optimizer": {"lr": draw.choice([1e-12, 1e6, 1e-5, draw.random()])},
        "training": {"steps": 1, "prompts_per_step": 1},
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_shown_spec_loads_as_the_same_spec(tmp_path, seed):
    draw = random.Random(seed)
    data = spec_data(draw)
    folder = tmp_path / "fol\nder \x7f # é"
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(dump(data), encoding="utf-8")
    checked = load_spec(path)
    assert checked.loaded.data == data
    assert checked.ok, [p.message for p in checked.problems]
    shown = annotated(checked)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]", shown)
    again = tmp_path / "resolved.yaml"
    again.write_text(shown + "\n", encoding="utf-8")
    back = load_spec(again, base=folder)
    assert back.ok  # a default written out may cause a warning
    assert back.spec == checked.spec
    assert repr(back.spec) == repr(checked.spec)  # tells 1 from true and 1.0
    assert [line.partition("  # ")[0] for line in annotated(back).splitlines()] == [
        line.partition("  # ")[0] for line in shown.splitlines()
    ]


@pytest.mark.parametrize("text", NASTY)
def test_every_text_round_trips_as_value_and_key(text):
    for key in (text[:100], f"a{text[:99]}"):
        source = read_text(f"{_key(key)}: {_text([text])}  # x:1", "x")
        assert source.problems == ()
        assert source.data == {key: [text]}
    assert read_text(dump({text[:100]: text}), "x").data == {text[:100]: text}


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_every_good_example_round_trips(path, tmp_path):
    checked = load_spec(path)
    again = tmp_path / path.name
    again.write_text(annotated(checked), encoding="utf-8")
    back = load_spec(again, base=path.parent)
    assert back.spec == checked.spec


def test_largest_spec_round_trips(tmp_path):
    """A resolved spec, with defaults and places, may be larger than a spec written by hand."""
    text = "x" * (MAX_SPEC_BYTES // 4 - 500)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: m}}\nlosses: {{a: cross_entropy}}\nrollout: {{sampled_by: dataset, stop: [&text {text}, *text, *text, *text]}}\n"
        "data: {source: {kind: inline, rows: [{q: x, d: y}]}, columns: {prompt: q, demonstration: d}}\n"
        "optimizer: {lr: 1e-3}\ntraining: {steps: 1, prompts_per_step: 1}\n"
    )
    checked = load_spec(path)
    assert checked.ok
    again = tmp_path / "resolved.yaml"
    again.write_text(annotated(checked), encoding="utf-8")
    assert again.stat().st_size > MAX_SPEC_BYTES
    assert load_spec(again, base=tmp_path).spec == checked.spec


@pytest.mark.parametrize("text", ['"\\ud800"', "0x" + "f" * 33, "1" + "0" * 39, '"' + "k" * 101 + '": 1'])
def test_text_that_cannot_be_written_is_not_read(text):
    assert read_text(f"a: {{{text}}}" if ":" in text else f"a: {text}", "x").problems


LONG = ".".join("a" * 30)
DEEP = "[" * 20 + "]" * 20


@pytest.mark.parametrize(
    "override",
    ["rewards." + "r" * 101 + "=1", "rewards.\udcff=1", f"data.source.rows.0.{LONG}={DEEP}", "x." * 5000 + "x=1"],
)
def test_override_that_cannot_be_written_is_a_problem(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(dump(spec_data(random.Random(0))), encoding="utf-8")
    checked = load_spec(path, [override])
    assert [p.code for p in checked.problems] == ["override"]
