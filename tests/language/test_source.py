"""YAML 1.2 scalars, places, and hostile or broken texts."""

import os

import pytest

from sdkit.language.errors import UnreadableInput
from sdkit.language.files import MAX_SPEC_BYTES
from sdkit.language.scalars import dump
from sdkit.language.source import read, read_text


def codes(text):
    return [p.code for p in read_text(text, "x").problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("+3", 3),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("Null", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("'8'", "8"),
        ('"true"', "true"),
        ("e5", "e5"),
        (".", "."),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    source = read_text(f"a: {text}", "x")
    assert source.problems == ()
    assert source.data == {"a": value}
    assert type(source.data["a"]) is type(value)


def node(source, *path):
    return dict(source.root.walk())[path]


def test_every_value_and_key_has_its_place():
    source = read_text("a:\n  - {b: 'xy'}\nc: |\n  long\n  text\n", "f.yaml")
    assert str(node(source, "c").key) == "f.yaml:3:1"
    assert str(node(source, "a", 0, "b").place) == "f.yaml:2:9"
    assert node(source, "a", 0, "b").place.length == 4
    assert str(node(source, "a").place) == "f.yaml:1:1"  # a list is shown by its key
    assert source.data == {"a": [{"b": "xy"}], "c": "long\ntext\n"}


def test_crlf_and_byte_order_mark_are_accepted(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    source = read(path)
    assert source.data == {"a": 1, "b": 2}
    assert node(source, "b").key.line == 2


def test_non_ascii_columns_count_characters():
    assert node(read_text("é: {ü: x}", "x"), "é", "ü").place.column == 8


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: 1\na: 2", "duplicate_key"),
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: !x y", "tag"),
        ("a: !!str 8", "tag"),
        ("a: &b {c: 1}\nd: {<<: *b}", "merge_key"),
        ("1: a", "key_type"),
        ("true: a", "key_type"),
        ("? [a]\n: b", "key_type"),
        ("a: .nan", "number"),
        ("a: -.INF", "number"),
        ("a: 1e999", "number"),
        ("a: " + "9" * 5000, "number"),
        ("a:\n\tb: 1", "yaml"),
        ("a: [1", "yaml"),
        ("a: 'x", "yaml"),
        ("a: b: c", "yaml"),
        ("a: @b", "yaml"),
        ("a: *b", "yaml"),
        ("a: &a [*a]", "yaml"),
        ("a: 1\n---\nb: 2", "yaml"),
        ("a: \x00", "yaml"),
        ("a: \x1b[31m", "yaml"),
        ("%FOO\n---\na: 1\n%", "yaml"),
        ("[" * 10_000, "yaml"),
        ("a: " + "{b: " * 10_000, "yaml"),
        ("".join(f"{' ' * i}a:\n" for i in range(300)), "yaml"),
        ("- " * 5_000, "yaml"),
    ],
)
def test_broken_or_hostile_text_is_one_problem_with_a_place(text, code):
    assert codes(text) == [code]
    assert all(p.place and p.place.line > 0 for p in read_text(text, "x").problems)


def test_aliases_are_bounded():
    lines = ["a: &a [1,1,1,1,1,1,1,1,1,1]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]")
    assert codes("\n".join(lines)) == ["yaml"]


def test_deep_aliases_are_bounded():
    chain = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{x: *a{i - 1}}}" for i in range(1, 200)]
    assert codes("\n".join(chain)) == ["yaml"]


def test_alias_stands_for_its_complete_value():
    source = read_text("a: &x {b: [1, 2]}\nc: *x\n", "x")
    assert source.data["c"] == {"b": [1, 2]}
    assert node(source, "c").place.line == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\n\n"])
def test_empty_text_has_no_data(text):
    source = read_text(text, "x")
    assert source.data is None
    assert source.problems == ()


def test_unreadable_file_is_reported_with_the_reason(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(UnreadableInput, match=r"latin\.yaml:2: byte 0xe9 is not UTF-8"):
        read(latin)
    with pytest.raises(UnreadableInput, match="a folder"):
        read(tmp_path)
    with pytest.raises(UnreadableInput, match="no such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(UnreadableInput, match="not a file name"):
        read("a\0b")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_SPEC_BYTES + 1))
    with pytest.raises(UnreadableInput, match="larger than 4 MiB"):
        read(large)
    assert read(large, resolved=True).problems == ()
    with pytest.raises(UnreadableInput, match="device"):
        read("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_forbidden_file_is_reported(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(UnreadableInput, match="permission denied"):
        read(path)


def test_dump_round_trips():
    texts = ["1e-6", "off", "yes", "~", "", "null", "a: b", "#x", "0o7", ".inf", "x\n y\n", "é", "<<"]
    data = {"list": texts, "map": {t or "empty": 1e-6 for t in texts}, "n": [1, 2.0, None, True]}
    source = read_text(dump(data), "x")
    assert source.problems == ()
    assert source.data == data
