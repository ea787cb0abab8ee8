"""The packaged method pages as `sdkit methods` lists them."""

import re

import pytest

from sdkit.language.errors import UnreadableInput
from sdkit.language.method_pages import find_pages, list_pages, method_page


@pytest.mark.parametrize(
    ("name", "paper", "needs"),
    [
        ("sdft", "2601.19897", ("column demonstration",)),
        ("sdpo", "2601.20802", ("a reward",)),
        ("sdpo_rich_feedback", "2601.20802", ("a reward with feedback",)),
        ("sdpo_turns", "2601.20802", ("an environment with feedback",)),
        ("gkd", "2306.13649", ("column demonstration", "a teacher model")),
        ("multi_teacher", "2601.02780", ("column domain", "a reward", "2 teacher models")),
        ("on_policy_distillation", "Lu 2025", ("a teacher model",)),
        ("sod", "2605.07725", ("an environment", "a reward", "a teacher model")),
        ("sft", "", ("column demonstration",)),
        ("ssd", "2604.01193", ()),
    ],
)
def test_paper_and_needs(name, paper, needs):
    page = method_page(name)
    assert (page.paper, page.needs) == (paper, needs)


def test_every_page_says_what_it_is_in_one_sentence():
    for page in find_pages():
        assert re.fullmatch(r"\S.{20,200}[^.]", page.summary), page.name
        assert "arXiv" not in page.summary
        assert page.paper or page.name == "sft"


def test_unknown_name_or_word_is_refused_with_the_closest_name():
    for find in (method_page, lambda name: find_pages([name])):
        with pytest.raises(UnreadableInput) as refused:
            find("sdpoo")
        assert refused.value.hint == 'did you mean "sdpo"?'


def test_a_narrow_list_has_a_line_for_each_page():
    lines = list_pages(find_pages(), 60).splitlines()
    assert len(lines) == len(find_pages()) + 1
    assert max(map(len, lines)) <= 60
