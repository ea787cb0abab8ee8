"""Merging a run file onto its method page, and overrides onto both."""

import pytest

from sdkit.language.load import load_spec
from sdkit.language.overlay import is_run_file, load, packaged_page

PAGE = """
rollout: {temperature: 0.5, stop: [a, b]}
teacher: {weights: frozen}
losses:
  distil:
    kind: distillation
    divergence: forward_kl
    support: {kind: top_k, k: 5, chosen_by: student, remainder: drop}
"""


@pytest.fixture
def load_over_page(tmp_path):
    """Returns a function that writes a run file next to the method page and calls load()."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/page.yaml").write_text(PAGE)

    def load_run_file(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text("method: methods/page.yaml\n" + text)
        return load(path, overrides)

    return load_run_file


def distil(loaded):
    return loaded.data["losses"]["distil"]


def test_maps_merge_and_other_values_are_replaced(load_over_page):
    loaded = load_over_page("rollout: {stop: [c], top_k: 5}\nteacher: null\n")
    assert loaded.data["rollout"] == {"temperature": 0.5, "stop": ["c"], "top_k": 5}
    assert loaded.data["teacher"] is None
    assert "method" not in loaded.data


def test_map_with_the_same_kind_is_merged(load_over_page):
    support = distil(load_over_page("losses: {distil: {support: {k: 9}}}"))["support"]
    assert support == {"kind": "top_k", "k": 9, "chosen_by": "student", "remainder": "drop"}


@pytest.mark.parametrize("kind", ["vocabulary", {"kind": "vocabulary"}])
def test_map_with_another_kind_is_replaced(load_over_page, kind):
    written = kind if isinstance(kind, str) else "{kind: vocabulary}"
    assert distil(load_over_page(f"losses: {{distil: {{support: {written}}}}}"))["support"] == kind


def test_bare_kind_stands_for_a_map(load_over_page):
    assert distil(load_over_page("losses: {distil: {divergence: reverse_kl}}"))["divergence"] == "reverse_kl"
    jsd = distil(load_over_page("losses: {distil: {divergence: {kind: jsd, teacher_share: 0.1}}}"))
    assert jsd["divergence"] == {"kind": "jsd", "teacher_share": 0.1}
    merged = distil(load_over_page("losses: {distil: {divergence: {x: 1}}}"))
    assert merged["divergence"] == {"kind": "forward_kl", "x": 1}
    unchanged = distil(load_over_page("losses: {distil: {support: top_k}}"))
    assert unchanged["support"]["k"] == 5


def test_every_value_knows_its_place(load_over_page):
    loaded = load_over_page("rollout: {top_k: 5}\n", "losses.distil.support.k=20", "rollout.top_p=0.9")
    files = {path: node.place.file.rsplit("/", 1)[-1] for path, node in loaded.nodes.items()}
    assert files["rollout", "temperature"] == "page.yaml"
    assert files["rollout", "top_k"] == "run.yaml"
    assert files["losses", "distil", "support", "k"] == "<command line>"
    assert files["losses", "distil", "support", "chosen_by"] == "page.yaml"
    assert loaded.place(("rollout", "top_p")).line == 2
    assert loaded.place(("rollout", "top_p")).column == 15
    assert loaded.texts["<command line>"].splitlines()[1] == "rollout.top_p=0.9"


def test_run_file_needs_no_method(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(PAGE + "model: {path: x}\n")
    loaded = load(path)
    assert (loaded.kind, loaded.method) == ("run", None)
    path.write_text(PAGE)
    assert load(path).kind == "method"


def test_run_file_is_recognized_by_its_keys():
    assert is_run_file({"model": 1})
    assert is_run_file({"method": 1})
    assert not is_run_file({"losses": {}})
    assert not is_run_file([])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("off", "off"), ("'8'", "8"), ("", None), ("[1, x]", [1, "x"]), ("a=b", "a=b")]
)
def test_override_values_are_yaml(load_over_page, text, value):
    assert load_over_page("", f"rollout.temperature={text}").data["rollout"]["temperature"] == value


def test_overrides_reach_into_lists_and_new_maps(load_over_page):
    data = load_over_page("", "rollout.stop.1=z", "model.lora.r=4").data
    assert data["rollout"]["stop"] == ["a", "z"]
    assert data["model"] == {"lora": {"r": 4}}


def test_override_of_a_kind_replaces_the_map(load_over_page):
    assert distil(load_over_page("", "losses.distil.support.kind=vocabulary"))["support"] == {"kind": "vocabulary"}
    assert distil(load_over_page("", "losses.distil.support.kind=top_k"))["support"]["k"] == 5


def test_later_override_wins(load_over_page):
    assert load_over_page("", "rollout.top_k=1", "rollout.top_k=2").data["rollout"]["top_k"] == 2


def test_method_can_be_overridden(tmp_path, load_over_page, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods/other.yaml").write_text("rollout: {temperature: 2}\n")
    loaded = load_over_page("", "method=methods/other.yaml")
    assert loaded.data == {"rollout": {"temperature": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "lr",
        "=1",
        "a..b=1",
        ".a=1",
        "rollout.temperature.x=1",
        "rollout.stop.7=1",
        "rollout.stop.x=1",
        "model.path='x",
        "model.path=!x y",
        "training.steps=.inf",
    ],
)
def test_bad_override_is_a_problem(load_over_page, text):
    problems = load_over_page("", text).problems
    assert [p.code for p in problems] == ["override"]
    assert problems[0].place
    assert problems[0].place.file == "<command line>"


@pytest.mark.parametrize("value", ["3", "null", "''", "[a]", "missing.yaml", ".", "methods"])
def test_unreadable_method_is_a_problem_with_its_place(tmp_path, value):
    (tmp_path / "methods").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: x}}\nmethod: {value}\n")
    loaded = load(path)
    assert [p.code for p in loaded.problems] == ["method_file"]
    assert loaded.problems[0].place
    assert loaded.problems[0].place.line == 2
    assert not loaded.is_complete


def test_problem_of_a_method_page_names_the_pages_file(tmp_path):
    (tmp_path / "page.yaml").write_text("rollout: {a: [}\n")
    path = tmp_path / "run.yaml"
    path.write_text("method: page.yaml\n")
    loaded = load(path)
    assert loaded.problems[0].place
    assert loaded.problems[0].place.file.endswith("page.yaml")
    assert loaded.kind == "run"


def test_empty_method_page_leaves_its_keys_missing(tmp_path):
    (tmp_path / "page.yaml").write_text("# nothing\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: page.yaml\nmodel: {path: x}\ndata: {source: {kind: hub, path: x}}\n"
        "optimizer: {lr: 1}\ntraining: {prompts_per_step: 1}\n"
    )
    assert [p.code for p in load_spec(path).problems] == ["missing_key"]


def test_linked_run_file_finds_its_method_page(tmp_path, load_over_page):
    load_over_page()
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link.yaml"
    link.symlink_to(tmp_path / "run.yaml")
    assert load(link).problems == ()


def test_bare_name_is_a_packaged_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text("method: sdft\nmodel: {path: x}\n")
    loaded = load(run)
    assert not loaded.problems
    assert loaded.method == packaged_page("sdft")
    assert load("sdft").data == load(packaged_page("sdft")).data


def test_path_with_a_dot_is_a_file_next_to_the_run_file(tmp_path):
    (tmp_path / "sdft.yaml").write_text("rollout: {max_new_tokens: 7}\n")
    run = tmp_path / "run.yaml"
    run.write_text("method: ./sdft.yaml\nmodel: {path: x}\n")
    assert load(run).data["rollout"] == {"max_new_tokens": 7}


def test_unknown_method_name_gets_a_suggestion(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("method: sdtf\nmodel: {path: x}\n")
    [problem] = load(run).problems
    assert (problem.message, problem.hint) == ("there is no packaged method 'sdtf'", 'did you mean "sdft"?')


def test_override_of_a_kind_is_blamed_for_the_keys_that_the_new_kind_lacks(load_over_page, tmp_path):
    load_over_page()
    problems = load_spec(tmp_path / "run.yaml", ["teacher.weights.kind=copy"]).problems
    (missing,) = [p for p in problems if p.path == ("teacher", "weights", "every")]
    assert missing.place
    assert missing.place.file == "<command line>"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("losses.distil.support.kind", "'kind' is one of 'vocabulary', 'top_k', 'sampled_token'"),
        ("losses.distil.support", "'support' is one of 'vocabulary', 'top_k', 'sampled_token'"),
        ("rollout.temperature", "'temperature' is a number"),
    ],
)
def test_a_question_mark_asks_what_a_key_takes(load_over_page, tmp_path, key, message):
    load_over_page()
    problems = load_spec(tmp_path / "run.yaml", [f"{key}=?"]).problems
    assert message in [p.message for p in problems]


def test_an_override_that_changes_a_kind_names_what_it_drops():
    checked = load_spec("sdft", ["teacher.sees.kind=system_message", "teacher.sees.template=An expert answers."])
    (problem,) = [p for p in checked.problems if p.code == "dropped_keys"]
    assert "'slots'" in problem.message
    assert problem.place
    assert problem.place.file == "<command line>"
