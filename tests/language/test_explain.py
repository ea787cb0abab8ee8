"""`sdkit explain`: every key, kind and code has an explanation with an example."""

import pytest

from sdkit.language.errors import UnreadableInput
from sdkit.language.explain import codes, explain, names, overview
from sdkit.language.introspection import keys_of
from sdkit.language.specs import ExperimentSpec
from sdkit.language.suggestions import BY_PEER, all_keys


def test_every_name_is_explained():
    assert len(names()) > 400
    for name in names():
        text = explain(name, 80)
        assert "NoneType" not in text
        assert name in text


def test_every_key_is_explained_at_its_path_with_an_example():
    for at in {at.path: at for at in all_keys()}.values():
        text = explain(".".join(map(str, at.path)).replace("NAME", "mine"), 100)
        assert "  takes     " in text
        assert "example" in text or at.key.default is None, at.path


def test_a_choice_is_explained_with_the_keys_of_each_kind():
    text = explain("losses.distil.divergence")
    assert text.startswith("losses.NAME.divergence\n  divergence between student and teacher\n")
    assert "    jsd\n" in text
    assert "        teacher_share: number, > 0, < 1, or a schedule; default `0.5`\n" in text
    assert "    divergence: jsd  # beta" in text


def test_a_number_is_explained_with_its_range_default_and_source():
    text = explain("teacher.weights.update_rate")
    assert "  range     0, 1, or a number from 1e-6 to 0.999999\n" in text
    assert "  default   none: the key is required\n" in text
    assert "  of kind   ema\n" in text
    assert "update_rate: 0.01  # ref_model_mixup_alpha" in text
    assert "from sdkit/methods/sdft.yaml" in text


def test_a_kind_is_explained_by_name_and_at_its_key():
    assert explain("jsd").startswith("jsd, a kind of losses.NAME.divergence\n")
    assert explain("jsd") == explain("divergence.jsd") == explain("losses.distil.divergence=jsd")


def test_keys_of_one_name_are_listed():
    text = explain("path", 140)
    assert "keys are named path" in text
    places = ["data.source.path", "evaluation.suites.NAME.data.source.path", "evaluation.panel.0.data.source.path"]
    assert f"  {', '.join(places)} of jsonl, json, csv, parquet\n" in text


@pytest.mark.parametrize("code", codes())
def test_a_code_is_explained_with_a_bad_and_a_good_example(code):
    text = explain(code, 100)
    assert f"{code} ({codes()[code].severity}" in text
    if code != "override":
        assert f"[{code}]" in text
        assert text.index("Breaks the rule:") < text.index(f"[{code}]") < text.index("Keeps it:")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("divergnce", 'did you mean "divergence"?'),
        ("optimizer.lrr", 'did you mean "lr"?'),
        ("optimzer.lr", 'did you mean "optimizer.lr"?'),
        ("training.lr", 'sdkit has "optimizer.lr"'),
        ("no_techer", 'did you mean "no_teacher"?'),
        ("group_relativ", 'did you mean "group_relative"?'),
        ("learning_rate", 'sdkit calls it "lr"'),
        ("beta", BY_PEER["beta"]),
        ("model.lora.rank", 'renamed to "r", as in PEFT'),
        ("zzzzzz", "`sdkit explain` lists the keys of a run file"),
        ("", "`sdkit explain` lists the keys of a run file"),
    ],
)
def test_an_unknown_name_has_a_hint(name, hint):
    with pytest.raises(UnreadableInput, match="no key, kind or code") as error:
        explain(name)
    assert error.value.hint == hint


def test_the_overview_has_every_key_of_a_run_file():
    assert all(f"\n  {key}: " in overview() for key in ["method", *keys_of(ExperimentSpec)])
