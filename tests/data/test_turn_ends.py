"""Which token ends a turn, what a data set's completion ends with, and that no prompt ends with a token appended."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sdkit.data.prompts import Prompter
from sdkit.data.turn_ends import encode_prompt, end_token
from sdkit.language.errors import BadData
from sdkit.language.specs import AnswerStart, ColumnSlot, Table

ANSWER = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}%END{% endfor %}"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """One with more markers than the tokenizer's own end, `<|im_end|>`; the last of them is no special token."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tiny_tokenizer.backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|end|>", "<|endoftext|>", "<s>"],
    )
    made.add_tokens(["<end>", "</think>"])
    return made


@pytest.mark.parametrize(
    ("behind", "token"),
    {
        "<|im_end|>\n": "<|im_end|>",
        "<|end|>\n": "<|end|>",
        " <|end|>": "<|end|>",
        "\n<|end|>\n<|endoftext|>": "<|end|>",
        "<end>\n": "<end>",
        "</answer><|end|>": "<|end|>",
        "</answer></think><|end|>": "<|end|>",
        "{{ eos_token }}": "<|im_end|>",
        "{% if loop.last %}<|endoftext|>{% else %}<|end|>{% endif %}": "<|endoftext|>",
        "{% if not add_generation_prompt %}<|end|>{% endif %}": "<|end|>",
        "\n### Next": "<|im_end|>",  # no marker: the tokenizer's
        "": "<|im_end|>",
    }.items(),
)
def test_a_turn_ends_with_what_the_template_writes_behind_an_answer(tokenizer, behind, token):
    tokenizer.chat_template = ANSWER.replace("%END", behind)
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer, {})) == token


def test_options_of_the_template_are_heeded(tokenizer):
    end = "{% if short %}<end>{% else %}<|end|>{% endif %}"
    tokenizer.chat_template = ANSWER.replace("%END", end)
    ends = [end_token(tokenizer, {"short": short}) for short in (True, False)]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<end>", "<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('only tools') }}",
        "{{ messages[1]['content'][0]['text'] }}<|end|>",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|end|>{% endfor %}",
        "{{ messages[1]['content'] | length + 'a' }}",
    ],
)
def test_without_an_answer_of_the_template_it_is_the_tokenizers_end(tokenizer, template):
    tokenizer.chat_template = template
    assert end_token(tokenizer, {}) == tokenizer.eos_token_id


def test_without_either_there_is_none(tokenizer):
    tokenizer.chat_template, tokenizer.eos_token = None, None
    assert end_token(tokenizer, {}) is None


def test_a_completion_ends_once(tokenizer):
    end, own = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    text = tuple(tokenizer("12")["input_ids"])
    assert Prompter(tokenizer, {}).completion_ids("12", end) == (*text, end)
    assert Prompter(tokenizer, {}).completion_ids("12<|end|>", end) == (*text, end)
    assert Prompter(tokenizer, {}).completion_ids("12<|im_end|>", end) == (*text, own)
    assert Prompter(tokenizer, {}).completion_ids("", end) == (end,)


@pytest.fixture(params=["$A <|im_end|>", "$A <|endoftext|> <|im_end|>", "<s> $A", "<s> $A <|im_end|>", "$A"])
def adding(request, tokenizer):
    """A tokenizer that adds tokens at the ends, and how many it adds before."""
    words = [word for word in request.param.split() if word != "$A"]
    marks = list(zip(words, tokenizer.convert_tokens_to_ids(words), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=request.param, special_tokens=marks)
    assert len(tokenizer("a")["input_ids"]) == 1 + len(marks)
    return tokenizer, request.param.split().index("$A")


@pytest.mark.parametrize("text", ["What is 3 + 9?", "one <|im_end|>", "<s>one", "<s>", ""])
def test_a_prompt_has_what_a_tokenizer_puts_before_it_and_nothing_that_it_appends(adding, text):
    tokenizer, before = adding
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    begin = tuple(tokenizer.convert_tokens_to_ids(["<s>"])) * before
    assert encode_prompt(tokenizer, text) == begin + bare


@pytest.mark.parametrize("template", [None, "<s>" + ANSWER.replace("%END", "<|im_end|>\n")])
def test_prompts_of_both_and_completions_have_no_appended_token(adding, make_row, template):
    tokenizer, before = adding
    tokenizer.chat_template = template
    row = make_row(demonstration="3 + 9 = 12")
    slots = Table({"demonstration": ColumnSlot(name="demonstration")})
    sees = AnswerStart(template="So {demonstration}", slots=slots)
    prompter = Prompter(tokenizer, {})
    student, teacher = prompter.student_ids(row), prompter.teacher_ids(row, sees)
    text = "What is 2 + 2?"
    if template:
        text = f"<s><|im_start|>user\n{text}<|im_end|>\n"
    elif before:
        text = f"<s>{text}"
    assert tokenizer.decode(student) == text
    assert tokenizer.decode(teacher.ids) == f"{text}So 3 + 9 = 12"
    own = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert Prompter(tokenizer, {}).completion_ids("12", 7) == (*own, 7)


def test_a_tokenizer_that_writes_the_text_otherwise_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 5, 6, 2] if add_special_tokens else [7, 8]}

    with pytest.raises(BadData, match="no chat template"):
        encode_prompt(tokenizer, "text")
