"""The token that ends a turn or a data set's completion, and that no token is appended to a prompt."""

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
    """A tokenizer with more end markers than its own `<|im_end|>`; the last, `<end>`, is not a special token."""
    extended = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tiny_tokenizer.backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|end|>", "<|endoftext|>", "<s>"],
    )
    extended.add_tokens(["<end>", "</think>"])
    return extended


@pytest.mark.parametrize(
    ("suffix", "token"),
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
        "\n### Next": "<|im_end|>",  # no marker: the tokenizer's end token
        "": "<|im_end|>",
    }.items(),
)
def test_end_token_is_the_one_that_the_template_writes_after_an_answer(tokenizer, suffix, token):
    tokenizer.chat_template = ANSWER.replace("%END", suffix)
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer, {})) == token


def test_end_token_depends_on_the_templates_options(tokenizer):
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
def test_end_token_falls_back_to_the_tokenizers(tokenizer, template):
    tokenizer.chat_template = template
    assert end_token(tokenizer, {}) == tokenizer.eos_token_id


def test_end_token_is_none_without_template_and_tokenizer_end(tokenizer):
    tokenizer.chat_template, tokenizer.eos_token = None, None
    assert end_token(tokenizer, {}) is None


def test_completion_gets_one_end_token(tokenizer):
    end, own = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    text = tuple(tokenizer("12")["input_ids"])
    assert Prompter(tokenizer, {}).completion_ids("12", end) == (*text, end)
    assert Prompter(tokenizer, {}).completion_ids("12<|end|>", end) == (*text, end)
    assert Prompter(tokenizer, {}).completion_ids("12<|im_end|>", end) == (*text, own)
    assert Prompter(tokenizer, {}).completion_ids("", end) == (end,)


@pytest.fixture(params=["$A <|im_end|>", "$A <|endoftext|> <|im_end|>", "<s> $A", "<s> $A <|im_end|>", "$A"])
def adding_tokenizer(request, tokenizer):
    """A tokenizer that adds tokens before or after a text, and how many it adds before."""
    words = [word for word in request.param.split() if word != "$A"]
    marks = list(zip(words, tokenizer.convert_tokens_to_ids(words), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=request.param, special_tokens=marks)
    assert len(tokenizer("a")["input_ids"]) == 1 + len(marks)
    return tokenizer, request.param.split().index("$A")


@pytest.mark.parametrize("text", ["What is 3 + 9?", "one <|im_end|>", "<s>one", "<s>", ""])
def test_prompt_has_prepended_but_no_appended_tokens(adding_tokenizer, text):
    tokenizer, before = adding_tokenizer
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    prefix = tuple(tokenizer.convert_tokens_to_ids(["<s>"])) * before
    assert encode_prompt(tokenizer, text) == prefix + bare


@pytest.mark.parametrize("template", [None, "<s>" + ANSWER.replace("%END", "<|im_end|>\n")])
def test_prompts_and_completions_have_no_appended_token(adding_tokenizer, make_row, template):
    tokenizer, before = adding_tokenizer
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
    ids = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert Prompter(tokenizer, {}).completion_ids("12", 7) == (*ids, 7)


def test_tokenizer_that_changes_the_text_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 5, 6, 2] if add_special_tokens else [7, 8]}

    with pytest.raises(BadData, match="no chat template"):
        encode_prompt(tokenizer, "text")
