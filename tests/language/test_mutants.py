"""Mutated shipped specs give problems, or a plan and a text that loads as the same spec, but never a traceback."""

import copy
import random
from pathlib import Path

import pytest

from sdkit.language.errors import UnreadableInput, render
from sdkit.language.formats import as_github, as_json, as_sarif
from sdkit.language.load import load_spec
from sdkit.language.scalars import dump
from sdkit.language.show import annotated
from sdkit.language.source import read
from sdkit.plan.machine import machine_for, other_shapes, shape_of
from sdkit.plan.plan import make_plan, plan_method
from sdkit.plan.text import render_method, render_plan

SPECS = Path(__file__).resolve().parents[2] / "specs"
METHODS = SPECS.parent / "sdkit" / "methods"
PAGES = sorted([*SPECS.glob("*.yaml"), *METHODS.glob("*.yaml"), *SPECS.glob("papers/*.yaml")])
SCALARS = (
    *(None, True, False, 0, -1, 1, 2, 64, 10**9, 10**9 + 1, 10**38, 0.5, -0.0, 1.0, 1e6, 1e-12, 1e39, 1e308, 5e-324),
    *("", " ", "a", "\0", "a\nb", "\u2028", "x" * 5000, "{", "{prompt}", "{a.b}", "..", "/dev/zero", "true", "1e5"),
    *("http://[", "http://x:99999", "bundled:x", "student", "teacher", "frozen", "vocabulary", "sampled_token", "file"),
    *("vllm", "vllm_server", "cross_entropy", "log_ratio", "group_relative", "advantage_add"),
)  # fmt: skip
MAPS = (
    *([], [[]], [None], ["a", "a"], [1, 2], [0.5, -0.5], {}, {"": 1}, {"a": {}}, {"kind": "x"}, {"kind": []}),
    *({"kind": "file", "file": "/dev/zero", "function": "f"}, {"file": ".", "function": ""}),
    *({"from": 0, "to": 1, "steps": 1}, {"from": 1e-6, "to": 1e6, "steps": 10**9, "shape": "cosine"}),
    *({"kind": "external", "path": "."}, {"kind": "served", "url": "http://x", "model": "m"}),
    *({"kind": "routed", "by": "a", "routes": {"b": "frozen"}}, {"kind": "ema", "update_rate": 0}),
    *({"kind": "mixture", "student_share": 0}, {"kind": "weighted", "parts": {"a": 1}}, {"kind": "replay", "run": "."}),
    *({"kind": "policy_gradient", "advantage": "log_ratio"}, {"kind": "trust_region", "student_share": 0}),
    {"kind": "top_k", "k": 10**9, "chosen_by": "union", "remainder": "drop"},
)  # fmt: skip
HOSTILE = "{}[]:,\"'&*!|>%@`#- \t\\?\x85"


def paths_in(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield from paths_in(value[name], (*path, name))


def value_at(data, path):
    for name in path:
        data = data[name]
    return data


def mutate_data(draw, data):
    """Returns the data with one value replaced, removed, moved or copied under another name."""
    data = copy.deepcopy(data)
    every = [path for path in paths_in(data) if path]
    path, other = draw.choice(every), draw.choice(every)
    node, name = value_at(data, path[:-1]), path[-1]
    match draw.randrange(6):
        case 0 | 1 | 2:
            node[name] = copy.deepcopy(draw.choice(SCALARS + MAPS))
        case 3:
            del node[name]
        case 4 if isinstance(node, dict):
            node[draw.choice(["", "true", "kind", "loss", "a b", str(other[-1])])] = node[name]
        case _:
            node[name] = copy.deepcopy(value_at(data, other))
    return data


def mutate_text(draw, text):
    """Returns the text with one line deleted, repeated or indented, or one character inserted."""
    lines = text.split("\n")
    index = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            del lines[index]
        case 1:
            lines.insert(index, draw.choice(lines))
        case 2:
            lines[index] = " " * draw.randint(1, 3) + lines[index]
        case _:
            cut = draw.randint(0, len(lines[index]))
            lines[index] = lines[index][:cut] + draw.choice(HOSTILE) + lines[index][cut:]
    return "\n".join(lines)


def check_plan_and_show(path, again):
    """Runs everything that `validate`, `plan` and `show` do."""
    checked = load_spec(path, base=path.parent)
    assert checked.ok or checked.problems
    assert "Traceback" not in render(checked.problems, checked.texts)
    for write in (as_json, as_github, as_sarif):
        assert "Traceback" not in write(checked.problems)
    if not checked.ok:
        return
    if checked.kind == "method":
        render_method(plan_method(checked.spec))
    else:
        run, folder = checked.spec, path.parent
        shapes = shape_of(run, folder), other_shapes(run, folder)
        plan = make_plan(run, machine_for(run), shapes[0], other_shapes=shapes[1])
        assert "inf" not in render_plan(run, plan).split()
    again.write_text(annotated(checked), encoding="utf-8")
    assert load_spec(again, base=path.parent).spec == checked.spec


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_mutant_of_a_shipped_spec_ends_in_a_traceback(page, tmp_path):
    draw = random.Random(page.stem)
    source = read(page)
    mutant = tmp_path / "mutant.yaml"
    for number in range(10):
        text = mutate_text(draw, source.text) if number % 4 == 3 else dump(mutate_data(draw, source.data))
        mutant.write_text(text, encoding="utf-8")
        try:
            check_plan_and_show(mutant, tmp_path / "again.yaml")
        except UnreadableInput:
            continue
        except Exception as error:
            raise AssertionError(f"{error!r} of:\n{text}") from error
