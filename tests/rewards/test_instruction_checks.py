"""The checks of instructions, the languages that they tell apart, and the packaged instructions."""

import json
from pathlib import Path

import pytest

from sdkit.batches import Row
from sdkit.data.rows import load_rows
from sdkit.language.errors import BadData
from sdkit.language.panel import INSTRUCTIONS
from sdkit.language.specs import DataSpec, InstructionChecks, InstructionSuite, JsonLinesSource, Table
from sdkit.rewards.answer_language import LANGUAGES, is_in_language
from sdkit.rewards.instruction_checks import CHECKS, instruction_checks, run_check

FOLLOWED = [
    ({"check": "words", "at_least": 2, "at_most": 3}, "don't stop-gap", "one"),
    ({"check": "sentences", "at_most": 2}, "One. Two!", "One. Two! Three"),
    ({"check": "characters", "at_most": 3}, "abc", "abcd"),
    ({"check": "lines", "count": 2}, "a\n\nb", "a"),
    ({"check": "paragraphs", "count": 2}, "a\nb\n \nc", "a\nb"),
    ({"check": "bullets", "count": 2}, "- a\n* b", "- a\n-b"),
    ({"check": "numbered", "count": 2}, "Items:\n1. a\n2) b", "1. a\n3. b"),
    ({"check": "numbered", "count": 2}, "1. a\n2. b", "1. a\n2. b\n3. c"),
    ({"check": "headings", "count": 1}, "# Title\ntext", "#Title"),
    ({"check": "table", "columns": 2}, "Here:\n| a | b |\n|---|:-:|\n| 1 | 2 |", "| a | b |\n| 1 | 2 |\n| 3 | 4 |"),
    ({"check": "json_object", "keys": ["a", "b"]}, '```json\n{"a": 1, "b": 2}\n```', '{"a": 1}'),
    ({"check": "json_list", "count": 2}, "[1, 2]", "Here: [1, 2]"),
    ({"check": "starts_with", "start": "Why"}, "why not", "Ask why"),
    ({"check": "ends_with", "end": "Done"}, "All of it. Done.", "Done with it"),
    ({"check": "ends_with", "end": "?"}, "Is it?", "It is."),
    ({"check": "wrapped", "left": '"', "right": '"'}, '"Hello"', '""'),
    ({"check": "marked", "left": "*", "right": "*", "at_least": 2}, "*a* and *b*", "*a* and b"),
    ({"check": "marked", "left": "<<", "right": ">>"}, "<<A title>>", "<< >>"),
    ({"check": "upper_case"}, "STOP 1", "123"),
    ({"check": "lower_case"}, "stop 1", "Stop"),
    ({"check": "contains", "words": ["salt", "a b"]}, "Salt, a b.", "salty a b"),
    ({"check": "excludes", "words": ["snow"]}, "snowy", "The snow"),
    ({"check": "excludes", "words": ["snow"]}, "ice", ""),
    ({"check": "occurs", "word": "song", "at_least": 2}, "song, SONG", "song"),
    ({"check": "letter", "letter": "z", "at_least": 2}, "Zz", "z"),
    ({"check": "letter", "letter": ",", "at_most": 0}, "a b", "a, b"),
    ({"check": "initials", "letter": "s"}, "Six swans", "six big swans"),
    ({"check": "one_of", "options": ["yes", "no"]}, "Yes.", "Yes, it is"),
    ({"check": "repeats", "sentence": "A b."}, "A  b.", "a b."),
    ({"check": "digits", "allowed": True}, "at 8", "at eight"),
    ({"check": "digits", "allowed": False}, "at eight", ""),
    ({"check": "language", "name": "German"}, "Der Hund ist nicht hier.", "The dog is not here."),
]
SENTENCES = {
    "English": "The boat is on the river and it was late.",
    "German": "Das Boot ist auf dem Fluss und es war spät.",
    "French": "Le bateau est sur la rivière et il était tard.",
    "Spanish": "El barco está en el río y ya era muy tarde.",
    "Italian": "La barca è sul fiume e anche questo non è molto tardi.",
    "Portuguese": "O barco não está no rio, mas é muito tarde.",
    "Dutch": "De boot is op het water en het was niet laat.",
    "Russian": "Лодка на реке, и уже поздно.",
    "Greek": "Το πλοίο είναι στο ποτάμι.",
    "Chinese": "船在河上。",
    "Japanese": "船は川の上にあります。",
    "Korean": "배가 강 위에 있습니다.",
    "Arabic": "القارب في النهر.",
    "Hebrew": "הסירה בנהר.",
    "Hindi": "नाव नदी में है।",
}


def row_of(checks):
    return Row(index=3, messages=({"role": "user", "content": "x"},), columns={"checks": checks}, raw={})


@pytest.mark.parametrize(("check", "good", "bad"), FOLLOWED, ids=lambda value: str(value)[:40])
def test_check_tells_a_good_answer_from_a_bad_one(check, good, bad):
    assert run_check(good, check)
    assert not run_check(bad, check)


def test_every_check_is_tested_and_takes_any_text():
    assert {check["check"] for check, _, _ in FOLLOWED} == set(CHECKS)
    for check, _, _ in FOLLOWED:
        for text in ("", " ", "\n\n", "|", "```", "[" * 2000, "\ud800", "é" * 5000):
            assert run_check(text, check) in (True, False)


def test_every_language_is_told_from_every_other():
    assert set(SENTENCES) == set(LANGUAGES)
    for spoken, text in SENTENCES.items():
        assert [language for language in LANGUAGES if is_in_language(text, language)] == [spoken]
    assert not is_in_language("123!", "English")


def test_all_checks_must_pass_or_each_gives_its_share():
    row = row_of([{"check": "upper_case"}, {"check": "words", "at_most": 1}])
    whole, share = instruction_checks(InstructionChecks()), instruction_checks(InstructionChecks(credit="share"))
    assert (whole("STOP", row).reward, share("STOP", row).reward) == (1.0, 1.0)
    half = share("STOP NOW", row)
    assert (whole("STOP NOW", row).reward, half.reward) == (0.0, 0.5)
    assert half.feedback == "not followed: words (at_most 1)"


def test_thoughts_are_left_out():
    scorer = instruction_checks(InstructionChecks())
    assert scorer("<think>let me see</think>\n\nSTOP\n", row_of([{"check": "upper_case"}])).reward == 1.0


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        (None, "row 3 has no list of checks"),
        ([], "row 3 has no list of checks"),
        (["words"], "row 3: there is no check null"),
        ([{"check": "word"}], "row 3: there is no check 'word'; did you mean \"words\"?"),
        ([{"check": "lines"}], "row 3: the check lines does not take these arguments"),
        ([{"check": "words", "at_most": "three"}], "row 3: the check words does not take these arguments"),
        ([{"check": "language", "name": "Klingon"}], "row 3: the check language knows"),
    ],
)
def test_a_row_with_a_wrong_check_is_named(checks, message):
    with pytest.raises(BadData) as error:
        instruction_checks(InstructionChecks()).check_row(row_of(checks))
    assert message in error.value.message


def test_packaged_instructions_are_different_and_can_be_checked():
    columns = Table({"prompt": "prompt", "checks": "checks"})
    rows = load_rows(DataSpec(source=JsonLinesSource(path=INSTRUCTIONS), columns=columns), Path("/"))
    scorer = instruction_checks(InstructionChecks())
    assert len(rows) == InstructionSuite().size == len({row.prompt_text.casefold() for row in rows})
    for row in rows:
        scorer.check_row(row)
        assert scorer("", row).reward == 0.0, row.prompt_text  # nothing is no answer
    used = {check["check"] for row in rows for check in row.columns["checks"]}
    assert used == set(CHECKS)
    with open(INSTRUCTIONS, encoding="utf-8") as file:
        assert all(json.loads(line).keys() == {"prompt", "checks"} for line in file)
