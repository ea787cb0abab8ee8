"""Checking a spec ends within seconds, with problems and no traceback, whatever its files and the files it names contain."""

import json
import os
import time

import pytest

from sdkit.language.errors import MAX_SHOWN_PROBLEMS, UnreadableInput, render
from sdkit.language.files import MAX_CONFIG_BYTES, MAX_SOURCE_CODE_BYTES, UnreadableFile, read_file, read_json_object
from sdkit.language.formats import as_github, as_json
from sdkit.language.load import load_spec
from sdkit.language.overlay import load
from sdkit.language.structure import MAX_ENTRIES
from sdkit.language.vocabulary import of_folder
from sdkit.plan.machine import other_shapes, shape_of

RUN = """\
model: {path: hub/model, dtype: float32}
data: {source: {kind: inline, rows: [{q: a, d: b}]}, columns: {prompt: q, demonstration: d}}
rollout: {sampled_by: dataset}
losses: {a: {kind: cross_entropy}}
optimizer: {lr: 1e-3}
training: {steps: 1, prompts_per_step: 1}
"""
LIMIT_SECONDS = 10.0  # seconds, on a slow machine


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.fixture(autouse=True)
def within_limit():
    """Fails a test of this file that takes longer than `LIMIT_SECONDS`."""
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < LIMIT_SECONDS


def make_irregular_files(folder):
    """Creates paths that are not regular files or are too large, and returns their names."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "to_zero").symlink_to("/dev/zero")
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**36)
    return ["pipe", "folder", "loop", "to_zero", "sparse", "/dev/zero", "/dev/stdin", "gone", "run.yaml/x", "x" * 3000]


def test_only_a_regular_file_within_its_limit_is_read(tmp_path):
    for name in make_irregular_files(tmp_path):
        with pytest.raises(UnreadableFile):
            read_file(tmp_path / name, MAX_CONFIG_BYTES)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_file(tmp_path / "small", 5) == b"12345" == read_file(tmp_path / "small")
    with pytest.raises(UnreadableFile, match="larger than"):
        read_file(tmp_path / "small", 4)
    for name in ("a\0b", "\ud800"):
        with pytest.raises(UnreadableFile, match="not a file name"):
            read_file(name, 5)


def test_spec_that_is_no_regular_file_is_unreadable(tmp_path):
    for name in make_irregular_files(tmp_path):
        with pytest.raises(UnreadableInput):
            load_spec(tmp_path / name)


NAMING = {
    "method": "method={name}",
    "divergence": "losses.b={{kind: distillation, support: vocabulary, divergence: {{file: {name}, function: f}}}}",
    "weight": "losses.a.weight={{file: {name}, function: f}}",
    "reward": "rewards.r={{kind: file, file: {name}, function: f}}",
    "reward model": "rewards.r={{kind: reward_model, path: {name}}}",
    "jsonl": "data.source={{kind: jsonl, path: {name}}}",
    "json": "data.source={{kind: json, path: {name}}}",
    "parquet": "data.source={{kind: parquet, path: {name}}}",
    "saved_dataset": "data.source={{kind: saved_dataset, path: {name}}}",
    "model": "model.path={name}",
    "teacher": "teacher.weights={{kind: external, path: {name}}}",
    "replay": "rollout.backend={{kind: replay, run: {name}}}",
}


READABLE = {("jsonl", "./sparse"), ("json", "./sparse"), ("parquet", "./sparse"), ("saved_dataset", "./folder")}
"""Checking does not read data files, so these are accepted."""


@pytest.mark.parametrize("key", NAMING)
def test_irregular_path_in_a_spec_is_a_problem(run_file, key, monkeypatch):
    monkeypatch.chdir(run_file.parent)  # where paths on the command line start
    bad = [*make_irregular_files(run_file.parent), '"a\\0b"', '"a\\nb"', '"a\\u2028b"', "x" * 5000]
    for name in bad:
        name = name if name[0] in "'\"" else f"./{name}"
        checked = load_spec(run_file, [NAMING[key].format(name=name)])
        assert checked.ok == ((key, name) in READABLE), name
        render(checked.problems, checked.texts)


BOMBS = {
    "parentheses": "(" * 100_000,
    "signs": "-" * 200_000 + "1",
    "sums": "+".join("1" * 100_000),
    "attributes": "a" + ".b" * 100_000,
    "calls": "a" + "()" * 100_000,
    "branches": "1 if x else " * 30_000 + "0",
    "digits": "x=" + "9" * 100_000,
    "NUL": "def f(): pass\0",
    "size": "#" * (MAX_SOURCE_CODE_BYTES + 1),
    "bytes": "\udcff",
    "encoding": "# coding: nope\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_source_file_that_cannot_be_parsed_is_a_problem(run_file, bomb):
    text = BOMBS[bomb].encode("utf-8", "surrogateescape")
    (run_file.parent / "mine.py").write_bytes(text)
    for key in ("divergence", "weight", "reward"):
        checked = load_spec(run_file, [NAMING[key].format(name="mine.py")])
        assert any(p.code.endswith("_file") and "mine.py" in p.message for p in checked.problems)


SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}
ODD = [0, -1, 10**400, 1.5, float("nan"), float("inf"), True, None, "8", [], [8], {}, {"a": 8}]
NO_OBJECTS = ["", "[", "[" * 100_000, "{}", "[]", "3", "null", '"x"', "\0", "9" * 5000]


def write_config(folder, text):
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "config.json").write_text(text)
    (folder / "m" / "tokenizer.json").write_text(text)


def test_odd_config_gives_sizes_or_none(run_file, monkeypatch):
    monkeypatch.chdir(run_file.parent)
    path = ["model.path=./m", "teacher={weights: {kind: external, path: ./m}}"]
    cases = [json.dumps(SIZES | {name: odd}) for name in SIZES for odd in ODD]
    cases += [json.dumps(SIZES | {"head_dim": odd, "num_key_value_heads": odd}) for odd in ODD]
    for text in [*NO_OBJECTS, *cases]:
        write_config(run_file.parent, text)
        checked = load_spec(run_file, path)
        assert checked.loaded.problems == ()
        if checked.spec:
            shape_of(checked.spec, run_file.parent)
            other_shapes(checked.spec, run_file.parent)
    write_config(run_file.parent, json.dumps(SIZES))
    assert shape_of(load_spec(run_file, path).spec, run_file.parent)


@pytest.mark.parametrize("model", [*ODD, {"vocab": 3}, {"vocab": [[]]}, {"vocab": [3]}, {"vocab": {"a": "x"}}])
@pytest.mark.parametrize("added", [*ODD, [{}], [{"content": "a", "id": float("nan")}]])
def test_odd_tokenizer_file_gives_no_vocabulary(tmp_path, model, added):
    write_config(tmp_path, json.dumps({"model": model, "added_tokens": added}))
    assert of_folder(tmp_path / "m") is None


def test_file_without_a_json_object_gives_none(tmp_path):
    for name in make_irregular_files(tmp_path):
        assert read_json_object(tmp_path / name, MAX_CONFIG_BYTES) is None
    for text in NO_OBJECTS:
        (tmp_path / "x.json").write_text(text)
        assert not read_json_object(tmp_path / "x.json", MAX_CONFIG_BYTES)


MANY = 30_000
FLOODS = {
    "unknown keys": "\n".join(f"kry{i}: 1" for i in range(MANY)),
    "the same key": "losses: {a: 1}\n" * MANY,
    "terms": "losses: {" + ", ".join(f"a{i}: sft" for i in range(MANY)) + "}",
    "kinds": f"rollout: {{keep: [{'empty, ' * 190}]}}\nx: [{'a, ' * MANY}]",
    "urls": f"rollout: {{backend: {{kind: vllm_server, urls: [{'a, ' * MANY}]}}}}",
    "one long key": "x" * 200_000 + ": 1",
    "one long word": "rollout: {sampled_by: " + "x" * 200_000 + "}",
    "nesting": "losses: " + "[" * 100_000,
    "open braces": "losses: " + "{a: " * 100_000,
    "an alias bomb": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijk", "bcdefghijkl", strict=True)),
    "a text bomb": "a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 50_000 + "]",
    "a key bomb": "a: &a {" + "x" * 90 + ": 1}\nb: [" + "*a, " * 49_000 + "]",
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
def test_flood_of_problems_is_counted_and_cut_within_the_limit(tmp_path, flood):
    path = tmp_path / "run.yaml"
    path.write_text(FLOODS[flood])
    checked = load_spec(path)
    assert not checked.ok
    text = render(checked.problems, checked.texts)
    assert text.count("\n") < 6 * MAX_SHOWN_PROBLEMS
    assert len(text) < 2**20
    if len(checked.problems) > MAX_SHOWN_PROBLEMS:
        rest = f"… and {len(checked.problems) - MAX_SHOWN_PROBLEMS} more problems"
        assert text.endswith(rest)
        assert as_github(checked.problems).endswith(rest)
    assert len(json.loads(as_json(checked.problems))) == len(checked.problems)


def test_pairwise_rules_have_a_limit(run_file):
    """The largest allowed number of names, each of them invalid or a prefix of the others."""
    names = [f"r{i}" for i in range(MAX_ENTRIES)]
    parts = {
        n: {"kind": "weighted", "parts": dict.fromkeys(names[i + 1 :] or ["x"], 1.0)} for i, n in enumerate(names)
    }
    data = {"source": {"kind": "inline", "rows": [{"q": "a"}]}, "columns": {"prompt": "q"}}
    suites = {n: {"data": data, "score": n, "also": [*names[1:], "nope"]} for n in names[:50]}
    overrides = [f"rewards={json.dumps(parts)}", f"evaluation={json.dumps({'suites': suites})}"]
    checked = load_spec(run_file, overrides)
    assert {"unknown_part", "unknown_reward"} <= {p.code for p in checked.problems}
    too_many = json.dumps({name: {"kind": "regex", "pattern": "x"} for name in [*names, "more"]})
    (problem,) = load_spec(run_file, [f"rewards={too_many}"]).problems
    assert problem.message == f"{MAX_ENTRIES + 1} entries, more than {MAX_ENTRIES}"


def test_rows_may_exceed_the_limit_on_entries(run_file):
    rows = json.dumps([{"q": "a", "d": [{"x": i}] * (MAX_ENTRIES + 1)} for i in range(MAX_ENTRIES + 1)][:100])
    assert load_spec(run_file, [f"data.source.rows={rows}"]).ok


def test_errors_are_shown_before_warnings(run_file):
    warnings = [f"losses.a{i}={{kind: cross_entropy, coefficient: 1}}" for i in range(3)]
    loaded = load(run_file, warnings)
    assert loaded.problems == ()
    from sdkit.language.errors import Problem

    many = [Problem((), f"w{i}", "w", severity="warning") for i in range(2 * MAX_SHOWN_PROBLEMS)]
    text = render([*many, Problem((), "the error", "e")], {})
    assert "the error [e]" in text
