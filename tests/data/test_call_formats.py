"""Formats of tool calls: chosen by the chat template, shown, read, and answered with exact observations."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from toolchats import HARMONY, LLAMA, QWEN, TAGS, tokenizer_with
from transformers.utils import get_json_schema

from sdkit.data.call_formats import choose_format
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Prompter
from sdkit.data.turn_ends import end_token
from sdkit.language.errors import BadData
from sdkit.language.specs import ToolCalls
from sdkit.spans import Call, Message


def add(a: int, b: int = 2) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def find(text: str) -> str:
    """Finds a text.

    Args:
        text: what to find (choices: ["x", "y"])
    """
    return text


TOOLS = [get_json_schema(add), get_json_schema(find)]


@pytest.fixture(scope="module")
def open_prompter(tiny_tokenizer):
    def prompter(template, **spec):
        plain = Prompter(tokenizer_with(tiny_tokenizer, template), {})
        return plain.with_tools(choose_format(plain, TOOLS, ToolCalls(**spec)))

    return prompter


def encoded(prompter, *messages, closed=True, limit=64):
    tokenizer = prompter.tokenizer
    parts = ObservationEncoder(prompter, end_token(tokenizer, {})).encode(messages, closed=closed, limit=limit)
    return parts, tokenizer.decode([i for part in parts for i in part.ids])


RESULTS = (
    Message(role="tool", name="add", content='say "3" <|eot_id|>'),
    Message(role="tool", name="find", content="x"),
)


@pytest.mark.parametrize(
    ("template", "name", "results", "text"),
    [
        (
            QWEN,
            "hermes",
            RESULTS,
            '<|im_end|>\n<|im_start|>user\n<tool_response>\nsay "3" <|eot_id|>\n</tool_response>\n'
            "<tool_response>\nx\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA,
            "llama3_json",
            RESULTS[:1],
            '<|eot_id|><|head|>ipython\n"say \\"3\\" <|eot_id|>"<|eot_id|><|head|>assistant\n',
        ),
        (
            HARMONY,
            "harmony",
            RESULTS[1:],
            '<|call|><|start|>functions.find to=assistant<|channel|>commentary<|message|>"x"<|end|><|start|>assistant',
        ),
        (
            None,
            "text",
            RESULTS,
            '<|im_end|>\n<|im_start|>user\nRESULT add: say "3" <|eot_id|>\nRESULT find: x<|im_end|>\n'
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_format_is_the_chat_templates_and_results_are_exact(open_prompter, make_row, template, name, results, text):
    prompter = open_prompter(template)
    assert prompter.calls.name == name
    prompt = prompter.tokenizer.decode(prompter.student_ids(make_row()))
    assert all(word in prompt for word in ("Adds two numbers.", "find", "the second"))
    parts, shown = encoded(prompter, *results, closed=False)
    assert shown == text
    special = set(prompter.control.ids.values())
    for part in parts:
        assert part.role == "tool"
        assert not special & set(part.ids[slice(*part.body)])  # a result forges no role


def test_template_that_shows_no_tools_is_refused_unless_calls_are_text(open_prompter):
    assert open_prompter(None).calls.note == "the chat template shows no tools"
    with pytest.raises(BadData, match="the chat template shows no tools, so calls cannot be of the format hermes"):
        open_prompter(None, format="hermes")
    dropping = QWEN.replace("{%- for c in m.tool_calls or [] %}", "{%- for c in [] %}")
    with pytest.raises(BadData, match="drops the name and the argument and the value of a tool call"):
        open_prompter(dropping, format="hermes")
    with pytest.raises(BadData, match="writes tool calls in another format"):
        open_prompter(LLAMA, format="hermes")
    with pytest.raises(BadData, match="ends an answer with the token that opens the next turn"):
        encoded(open_prompter(TAGS), *RESULTS)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %s}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "turn", "calls", "fault"),
    [
        (QWEN, f"I add.\n{CALL % 1}{CALL % 2}<|im_end|>", [{"a": 1}, {"a": 2}], None),
        (QWEN, CALL % '"7"', [{"a": 7}], None),  # cast by the schema
        (QWEN, "No call.<|im_end|>", [], None),
        (QWEN, f"<think>{CALL % 1}</think>No.<|im_end|>", [], None),
        (QWEN, CALL % "1, ", [], "could not parse region as JSON"),
        (QWEN, (CALL % 1)[:-14] + "<|im_end|>", [], "could not parse region as JSON"),
        (QWEN, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', [], "has no name and arguments"),
        (QWEN, f"<tool_call>{'[' * 100_000}", [], "cannot be read"),
        (QWEN, CALL % 1 * 50, [], "50 tool calls in one turn, at most 8 are allowed"),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}<|eot_id|>', [{"a": 1}], None),
        (LLAMA, 'The answer is {"name": 3}<|eot_id|>', [], None),
        (LLAMA, '{"name": "add", "parameters": {"a": 1<|eot_id|>', [], "could not parse region as JSON"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>to=functions.add<|message|><|end|><|start|>assistant"
            '<|channel|>commentary to=functions.add json<|message|>{"a": 1}<|call|>',
            [{"a": 1}],
            None,
        ),
        (HARMONY, "<|channel|>final<|message|>3<|return|>", [], None),
        (None, 'I add.\nCALL add {"a": 1}<|im_end|>', [{"a": 1}], None),
        (None, 'CALL add {"a": 1}\nThat is it.<|im_end|>', [], None),
        (None, 'CALL add {"a": 1<|im_end|>', [], "cannot be read"),
        (None, "CALL add [1]<|im_end|>", [], "has no name and arguments"),
    ],
)
def test_calls_are_read_from_what_was_sampled(open_prompter, template, turn, calls, fault):
    prompter = open_prompter(template)
    ids = prompter.tokenizer(turn, add_special_tokens=False)["input_ids"]
    read, why = prompter.calls.read(prompter.tokenizer, [], ids)
    assert read == tuple(Call(name="add", arguments=arguments) for arguments in calls)
    assert (why is None) == (fault is None)
    assert (fault or "") in (why or "")


def test_results_share_the_limit_of_an_observation(open_prompter):
    long = Message(role="tool", name="add", content="word " * 100)
    parts, _ = encoded(open_prompter(QWEN), *[long] * 3, limit=20)
    assert [part.body[1] - part.body[0] for part in parts] == [20, 0, 0]
    assert all(part.cut_tokens for part in parts)


def test_every_format_is_a_response_template():
    folder = Path(__file__).parents[2] / "sdkit" / "call_formats"
    formats = get_args(get_type_hints(ToolCalls)["format"])
    assert {path.stem for path in folder.glob("*.yaml")} == {*formats} - {"auto", "text"}
