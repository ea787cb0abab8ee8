"""The answer in a completion: the text without thinking, in any tags, opened by the completion or by the prompt."""

import copy

import pytest

from sdkit.data.prompts import Prompter
from sdkit.data.thinking import TAGS, answer_text, without_thinking

INVITE = "<|im_start|>assistant\n"


@pytest.mark.parametrize(("start", "end"), TAGS)
def test_text_in_every_pair_of_tags_is_thinking(start, end):
    for text, expected in [
        ("{a}h{b}x", "x"),
        ("{a}h{b}x{a}h{b}y", "xy"),
        ("{a}h{a}h{b}x", "x"),
        ("{a}h{a}h{b}h{b}x", "x"),
        ("h{b}x", "x"),
        ("h{b}h{b}x", "x"),
        ("h{b}x{a}h", "x"),
        ("x{a}h", "x"),
        ("{a}h", ""),
        ("{a}h\nh{b}", ""),
        ("x", "x"),
    ]:
        assert without_thinking(text.format(a=start, b=end)) == expected, text


@pytest.mark.parametrize(("opening", "end"), [*TAGS, ("<ponder>", "</ponder>"), ("[HM]", "[/HM]")])
def test_thinking_opened_by_the_prompt_is_removed(opening, end):
    assert without_thinking("hm", opening) == ""
    assert without_thinking(f"hm{end}x", opening) == "x"
    assert without_thinking(f"{opening}hm{end}x", opening) == "x"


def with_generation_prompt(tokenizer, invite, answer=""):
    """A copy of the tokenizer with this generation prompt, and `answer` before each finished answer."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{answer}{{% endif %}}{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{invite}{{% endif %}}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("invite", "answer", "opening"),
    [
        (INVITE, "", ""),
        (INVITE + "<think>\n", "", "<think>"),
        (INVITE + "<think>\n\n</think>\n\n", "", ""),
        (INVITE + "<ponder>", "", "<ponder>"),
        (INVITE + "<ponder>\n", "<ponder></ponder>", "<ponder>"),
        (INVITE + "[THINK]", "", "[THINK]"),
        (INVITE + "<answerer>", "<answerer>", ""),
        ("<|im_start|>assistant\n<assistant>\n", "<assistant>\n", ""),
    ],
)
def test_opening_tag_of_the_generation_prompt_is_detected(tiny_tokenizer, make_row, invite, answer, opening):
    assert Prompter(with_generation_prompt(tiny_tokenizer, invite, answer), {}).opening(make_row()) == opening


def test_tags_may_be_special_tokens(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)

    def answer(text, opening=""):
        return answer_text(tokenizer, tokenizer(text)["input_ids"], opening)

    answers = [answer("h</think>4<|im_end|>"), answer("4 [THINK]<|im_end|>"), answer("h", "<think>")]
    assert answers == ["4", "4", ""]
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    assert tokenizer.decode(tokenizer("[THINK]h[/THINK]4")["input_ids"], skip_special_tokens=True) == "h4"
    assert answer("[THINK]h[/THINK]4<|im_end|>") == "4"
    assert answer("h[/THINK]4<|im_end|>", "[THINK]") == "4"
    assert answer("h<|im_end|>", "[THINK]") == ""
    assert answer("4 + 4<|im_end|>") == "4 + 4"
