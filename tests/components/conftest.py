"""Tokenizers and rows.  The tokenizer with a ChatML template is `tiny_tokenizer` of the parent folder."""

import copy

import pytest

from sdkit.batches import Row


@pytest.fixture(scope="session")
def plain_tokenizer(tiny_tokenizer):
    """The tiny tokenizer without a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def switching_tokenizer(tiny_tokenizer):
    """Its generation prompt closes the thinking at once unless the system message says /think."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    closed = "{% if '/think' not in messages[0]['content'] %}<think></think>{% endif %}"
    invite = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(invite, invite + closed)
    assert closed in tokenizer.chat_template
    return tokenizer


@pytest.fixture
def make_row():
    """A row from a prompt and columns; `before` stands before the prompt."""

    def made(prompt="What is 2 + 2?", index=0, before=(), **columns):
        messages = (*before, {"role": "user", "content": prompt})
        columns = {"prompt": prompt, **columns}
        return Row(index=index, messages=messages, columns=columns, raw=columns)

    return made
