"""Every number of the language has a lower and an upper bound, and no string may be empty; read from the fields."""

import importlib.util
import inspect
import itertools
import math
import re
import typing
from pathlib import Path

import pytest

from sdkit.language.introspection import Key, is_spec, keys_of, members
from sdkit.language.overlay import load
from sdkit.language.specs import HOTTEST_VLLM, ExperimentSpec, LoraSpec, OptimizerSpec, ServedWeights, Table
from sdkit.language.specs.run import RENDERING_ARGUMENTS, TEMPLATE_OPTION
from sdkit.language.structure import structure

FLOAT32 = 3.4e38
PLAIN_NAMES = {"losses", "slots", "rewards", "suites", "decoding"}
"""Tables whose names the rule plain_name checks."""
DATA = {"rows"}
"""Keys that hold the user's own data."""
WHITE_SPACE_COUNTS = {"stop", "pattern"}
FREE = {"options", "chat_template_kwargs", "engine_args", "arguments", "config"}
"""Keys whose strings a task, a template, an engine, a taskset or a user's class interprets."""


def classes():
    seen = {}

    def visit(tp):
        if is_spec(tp):
            if tp not in seen:
                seen[tp] = None
                for key in keys_of(tp).values():
                    visit(key.type)
        for part in typing.get_args(tp):
            visit(part)

    visit(ExperimentSpec)
    return seen


KEYS = [(cls, key) for cls in classes() for key in keys_of(cls).values()]
IDS = [f"{cls.__name__}.{key.name}" for cls, key in KEYS]


def entries(key: Key):
    """Yields the scalar types of a key, each with its range."""
    for option in members(key.type):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin in (tuple, Table):
            for tp in itertools.chain.from_iterable(map(members, args)):
                yield tp, key.each
        else:
            yield option, key.range


@pytest.mark.parametrize(("cls", "key"), KEYS, ids=IDS)
def test_number_is_bounded_within_float32(cls, key):
    for tp, range in entries(key):
        if tp not in (int, float):
            continue
        assert range is not None
        assert range.ends is not None
        low, high = range.ends
        assert abs(low) <= FLOAT32
        assert abs(high) <= FLOAT32
        assert range.accepts(tp(low))
        assert range.accepts(tp(high))
        beyond = (low - max(1, abs(low)), high + max(1, high))
        assert not any(map(range.accepts, beyond))
        if tp is int:
            assert high < 2**63
        # OPTION is passed to a template or a task; every other number is used in arithmetic.
        elif range.text.startswith("text") or "to 100" in range.text:
            continue
        else:
            tiny = [n for n in (1e-30, 1e-45, -1e-30) if range.accepts(n)]
            assert not tiny or low <= 0 < high <= 1, tiny


@pytest.mark.parametrize(("cls", "key"), KEYS, ids=IDS)
def test_text_is_not_empty(cls, key):
    for tp, range in entries(key):
        if tp is not str or key.name in DATA | FREE:
            continue
        assert range is not None
        assert not range.accepts("")
        assert range.accepts(" \t") == (key.name in WHITE_SPACE_COUNTS)


@pytest.mark.parametrize(("cls", "key"), KEYS, ids=IDS)
def test_names_of_a_table_are_not_blank(cls, key):
    tables = [t for t in members(key.type) if typing.get_origin(t) is Table]
    if tables and key.name not in PLAIN_NAMES | DATA:
        assert key.names is not None
        assert not any(map(key.names.accepts, ("", " ", "a\0b", "a\nb")))


def test_path_has_no_control_characters_and_limited_length():
    paths = [key.range for _, key in KEYS if key.name in ("path", "file", "folder", "run") and key.range]
    assert len(paths) > 10
    for range in paths:
        assert not any(map(range.accepts, ("a\0b", "a\nb", "x" * 5000)))
        assert range.accepts("./models/Größe 2")


def test_lowest_and_highest_temperature_are_vllms():
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(vllm.submodule_search_locations[0], "sampling_params.py").read_text()
    lowest = float(re.search(r"^_MAX_TEMP = (\S+)", source, re.M)[1])
    for cls, key in KEYS:
        if key.name == "temperature":
            assert key.range is not None
            assert key.range.accepts(lowest), cls
            assert not key.range.accepts(lowest / 2), cls
    assert f"if self.temperature > {HOTTEST_VLLM}:" in source


def test_template_options_exclude_arguments_of_rendering():
    """Reads the installed transformers, so that this test fails when an argument is added there."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        parameters = inspect.signature(function).parameters.values()
        arguments = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert arguments <= RENDERING_ARGUMENTS
    special = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    refused = [*RENDERING_ARGUMENTS, *special, "additional_special_tokens", "image_token", "", "a b"]
    assert not any(map(TEMPLATE_OPTION.accepts, refused))
    assert all(map(TEMPLATE_OPTION.accepts, ("enable_thinking", "date_string", "reasoning_effort")))


RUN = """\
model: {path: m, dtype: float32}
data: {source: {kind: inline, rows: [{q: a}]}, columns: {prompt: q}}
rollout: {sampled_by: dataset}
losses: {a: {kind: cross_entropy}}
optimizer: {lr: 1e-3}
training: {steps: 1, prompts_per_step: 1}
"""
REFUSED = {
    "rollout.sampled_by={kind: dataset, column: ''}": "'column' is empty",
    "rollout.sampled_by={kind: dataset, column: ' '}": "'column' is ' ', not a name ",
    "model.lora={r: 1, lora_alpha: 1, target_modules: ['']}": "'target_modules.0' is empty",
    "model.chat_template_kwargs.messages=x": "'messages' is not the name of an option",
    "model.chat_template_kwargs.bos_token=x": "'bos_token' is not the name of an option",
    "model.chat_template_kwargs={'': x}": "'' is not the name of an option",
    "data.limit=9223372036854775808": "'limit' is 9223372036854775808, not a whole number from 1",
    "data.columns={prompt: q, '': q}": "'' is not a name ",
    "losses.a.coefficient=1e39": "'coefficient' is 1e+39, not 0, or a number from 1e-12 to 1e6",
    "losses.a.coefficient=1e-30": "'coefficient' is 1e-30, not ",
    "losses.a.coefficient={from: 1e39, to: 0, steps: 5}": "'from' is 1e+39, not ",
    "machine.memory_gib=1e308": "'memory_gib' is 1e+308, not a number from ",
    "rewards={w: {kind: weighted, parts: {r: 1e39}}}": "'r' is 1e+39, not ",
    "rollout.temperature=0.001": "'temperature' is 0.001, not a number from 0.01 to 100",
    "rollout.stop=['']": "'stop.0' is empty",
    'model.path="a\\0b"': "'path' is 'a\\x00b', not a path",
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_value_out_of_range_is_one_problem_with_its_place(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    _, problems = structure(load(path, [override]))
    assert [p.code for p in problems] == ["range"]
    assert problems[0].message.startswith(REFUSED[override])
    assert problems[0].place.file == "<command line>"


@pytest.mark.parametrize(
    "build",
    [
        lambda: LoraSpec(r=1, lora_alpha=1.0, target_modules=("",)),
        lambda: OptimizerSpec(lr=math.inf),
        lambda: OptimizerSpec(lr=1e-3, betas=(0.9, 1.0)),
        lambda: ServedWeights(url="", model="m"),
    ],
)
def test_spec_built_in_python_has_the_same_ranges(build):
    with pytest.raises(ValueError, match="must be"):
        build()
