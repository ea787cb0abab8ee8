"""Templates: fields, literal braces, and inserted text, which is not parsed again."""

import pytest

from sdkit.language.templates import Field, TemplateError, fields, fill, parse


def test_template_is_parsed_into_fields_and_text():
    assert parse("a {b} {c.d.0}!") == ("a ", Field("b"), " ", Field("c", ("d", "0")), "!")
    assert parse("") == ()
    assert [str(f) for f in fields(parse("{a}{b.c}{a}"))] == ["a", "b.c", "a"]


def test_doubled_braces_are_literal_braces():
    assert parse("{{a}} {{{b}}}") == ("{a} {", Field("b"), "}")


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ("ab {", 3),
        ("}", 0),
        ("{}", 0),
        ("x{a b}", 1),
        ("{a:>3}", 0),
        ("{a!r}", 0),
        ("{a[0]}", 0),
        ("{0}", 0),
        ("{a.}", 0),
        ("{a{b}}", 0),
        ("{a\n}", 0),
        ("{é}", 0),
    ],
)
def test_anything_else_in_braces_is_an_error(text, offset):
    with pytest.raises(TemplateError) as caught:
        parse(text)
    assert caught.value.offset == offset


def test_inserted_text_is_not_parsed_again():
    values = {"a": "{b}", "b": "{a} {{"}
    assert fill(parse("{a}|{b}|{{a}}"), lambda field: values[field.name]) == "{b}|{a} {{|{a}"
