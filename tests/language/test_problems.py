"""How problems are printed."""

import json
import re
from pathlib import Path

from sdkit.language.errors import EXIT_CODES, INTERRUPTED, Place, Problem, SdkitError, nearest, render, shorten
from sdkit.language.explain import codes
from sdkit.language.formats import as_github, as_json, as_sarif
from sdkit.language.source import MULTILINE

TEXT = "losses:\n  divergence: revers_kl\n"
PROBLEM = Problem(
    ("losses", "divergence"),
    "'revers_kl' is not 'reverse_kl'",
    "choice",
    'did you mean "reverse_kl"?',
    Place("a.yaml", 2, 15, 9),
)


def test_problem_is_shown_with_its_line():
    assert render([PROBLEM], {"a.yaml": TEXT}) == (
        "a.yaml:2:15: 'revers_kl' is not 'reverse_kl' [choice]\n"
        "2 |   divergence: revers_kl\n"
        "  |               ^^^^^^^^^\n"
        '  = did you mean "reverse_kl"?'
    )


def test_problems_are_sorted_by_file_and_position():
    places = [Place("b", 1, 1), Place("a", 2, 1), Place("a", 1, 9), Place("a", 1, 2)]
    problems = [Problem((), "x", "c", None, place, "warning") for place in places]
    lines = render(problems, {}).splitlines()
    assert lines == [f"{p}: warning: x [c]" for p in sorted(map(str, places))]


def test_long_line_is_cut_around_the_marker():
    line = "x" * 500 + "HERE" + "y" * 500
    shown = render([Problem((), "m", "c", None, Place("a", 1, 501, 4))], {"a": line}).splitlines()
    start = shown[2].index("^")
    assert shown[1][start : start + 4] == "HERE"
    assert max(map(len, shown)) < 180


def test_tabs_before_the_marker_stay_tabs():
    shown = render([Problem((), "m", "c", None, Place("a", 1, 3, 1))], {"a": "\t\tx"})
    assert shown.splitlines()[2] == "  | \t\t^"


def test_place_outside_the_text_shows_no_line():
    assert render([Problem((), "m", "c", None, Place("a", 9, 1))], {"a": "x"}) == "a:9:1: m [c]"


def test_json_contains_every_field():
    (entry,) = json.loads(as_json([PROBLEM]))
    assert entry["path"] == ["losses", "divergence"]
    assert (entry["file"], entry["line"], entry["column"]) == ("a.yaml", 2, 15)
    assert json.loads(as_json([])) == []


def test_github_annotations_are_escaped():
    problem = Problem((), "50% a\nb", "c", None, Place("a,b:c.yaml", 1, 2, 3))
    assert as_github([problem]) == "::error file=a%2Cb%3Ac.yaml,line=1,col=2,endColumn=5,title=c::50%25 a%0Ab"


def test_sarif_names_the_rule_and_the_region():
    log = json.loads(as_sarif([PROBLEM]))
    (run,) = log["runs"]
    (result,) = run["results"]
    assert (log["version"], run["tool"]["driver"]["name"]) == ("2.1.0", "sdkit")
    assert (result["ruleId"], result["level"]) == ("choice", "error")
    assert result["message"]["text"] == """'revers_kl' is not 'reverse_kl' (did you mean "reverse_kl"?)"""
    (location,) = result["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "a.yaml"},
        "region": {"startLine": 2, "startColumn": 15, "endColumn": 24},
    }
    (rule,) = run["tool"]["driver"]["rules"]
    assert (rule["id"], rule["shortDescription"]["text"]) == ("choice", codes()["choice"].summary)


def test_sarif_without_problems_or_places():
    (run,) = json.loads(as_sarif([]))["runs"]
    assert run["results"] == run["tool"]["driver"]["rules"] == []
    (run,) = json.loads(as_sarif([Problem((), "m", "yaml")]))["runs"]
    assert "locations" not in run["results"][0]
    place = Place("/a b/ä.yaml", 1, 2, MULTILINE)
    (run,) = json.loads(as_sarif([Problem((), "m", "yaml", None, place)]))["runs"]
    assert run["results"][0]["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "file:///a%20b/%C3%A4.yaml"},
        "region": {"startLine": 1, "startColumn": 2},
    }


def test_nearest_is_none_without_a_close_name():
    assert nearest("revers_kl", ["reverse_kl", "jsd"]) == "reverse_kl"
    assert nearest("zebra", ["reverse_kl", "jsd"]) is None


def test_capital_letters_do_not_hide_a_name():
    assert nearest("SDFT", ["sft", "sdft"]) == "sdft"
    assert nearest("JSD", ["reverse_kl", "jsd"]) == "jsd"


def test_values_are_shown_as_yaml():
    assert [shorten(v) for v in (True, None, 3, "a\nb\x00")] == ["true", "null", "3", r"'a\nb\x00'"]
    assert len(shorten("x" * 500)) < 70


def test_exit_codes_of_errors_match_the_table():
    codes = {cls.exit_code for cls in SdkitError.__subclasses__()}
    assert codes == set(EXIT_CODES) - {0, INTERRUPTED} == set(range(1, 10))


def test_exit_codes_in_the_docs_match_the_table():
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.M)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES
