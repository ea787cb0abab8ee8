"""What paths mean: in a run file, in a method page, on the command line, and with `~`."""

import json

import pytest

from sdkit.language.load import load_spec
from sdkit.language.show import annotated

RUN = """
method: {method}
model: {{path: {model}}}
data:
  source: {{kind: jsonl, path: {data}}}
  columns: {{prompt: q}}
rewards: {{short: {{kind: file, file: score.py, function: score}}}}
optimizer: {{lr: 1e-5}}
training: {{steps: 1, prompts_per_step: 1}}
"""
PAGE = """
losses:
  imitate: {kind: cross_entropy, weight: {file: weight.py, function: weigh, given: [student_logprobs]}}
rollout: {sampled_by: {kind: dataset, column: prompt}}
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory, home, with a spec, a method page and data in folders of their own."""
    home = tmp_path / "home"
    for name in ("specs", "pages", "data", "tiny/model"):
        (home / name).mkdir(parents=True)
    for name in ("data/rows.jsonl", "specs/rows.jsonl"):
        (home / name).write_text(json.dumps({"q": "one"}) + "\n")
    (home / "specs/score.py").write_text("def score(completion, row):\n    return 1.0\n")
    (home / "pages/weight.py").write_text("def weigh(counts, student_logprobs):\n    return student_logprobs\n")
    (home / "pages/page.yaml").write_text(PAGE)
    (home / "tiny/model/config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def load_run(home, *overrides, method="../pages/page.yaml", data="rows.jsonl", model="bundled:smollm2-135m-instruct"):
    (home / "specs/run.yaml").write_text(RUN.format(method=method, data=data, model=model))
    checked = load_spec("specs/run.yaml", overrides)
    assert checked.spec is not None, [p.message for p in checked.problems]
    return checked


def data_file(checked):
    return (checked.base / checked.spec.data.source.path).resolve()


def test_path_in_a_file_starts_at_the_file(folders):
    checked = load_run(folders)
    assert checked.problems == ()
    assert checked.spec.data.source.path == "rows.jsonl"
    assert data_file(checked) == folders / "specs/rows.jsonl"
    weight = checked.spec.losses["imitate"].weight.file
    assert (checked.base / weight).resolve() == folders / "pages/weight.py"


def test_path_on_the_command_line_starts_at_the_working_directory(folders):
    checked = load_run(folders, "data.source.path=data/rows.jsonl", "model.path=tiny/model")
    assert checked.problems == ()
    assert checked.spec.data.source.path == "../data/rows.jsonl"
    assert data_file(checked) == folders / "data/rows.jsonl"
    assert (checked.base / checked.spec.model.path).resolve() == folders / "tiny/model"


def test_home_is_expanded_wherever_it_is_written(folders):
    page = folders / "pages/page.yaml"
    page.write_text(PAGE.replace("weight.py", "~/pages/weight.py"))
    checked = load_run(
        folders,
        "rewards.short.file=~/specs/score.py",
        "output.folder=~/runs",
        method="~/pages/page.yaml",
        data="~/data/rows.jsonl",
        model="~/tiny/model",
    )
    assert checked.problems == ()
    assert data_file(checked) == folders / "data/rows.jsonl"
    assert checked.spec.model.path == str(folders / "tiny/model")
    assert checked.spec.losses["imitate"].weight.file == str(page.parent / "weight.py")
    assert checked.spec.output.folder == str(folders / "runs")


def test_missing_file_of_an_override_says_where_the_path_starts(folders):
    (problem,) = load_run(folders, "data.source.path=rows.jsonl").problems
    assert problem.message == "there is no file ../rows.jsonl"
    assert problem.hint == "paths on the command line start at the working directory"


@pytest.mark.parametrize("target", ["rows.jsonl", "gone.jsonl"])  # itself, or a file that is not there
def test_link_that_leads_nowhere_is_named(folders, target):
    data = folders / "specs/rows.jsonl"
    data.unlink()
    data.symlink_to(target)
    (problem,) = load_run(folders).problems
    assert (problem.message, problem.hint) == (
        "there is no file rows.jsonl",
        "rows.jsonl is a link that leads nowhere",
    )


def test_model_folder_beside_the_spec_is_not_mistaken_for_one_of_the_command_line(folders):
    (folders / "specs/mine").mkdir()
    load_run(folders)
    (problem,) = load_spec("specs/run.yaml", ["model.path=mine"]).problems
    assert (problem.code, problem.hint) == ("path", "write specs/mine")
    assert load_run(folders, "model.path=acme/model").spec.model.path == "acme/model"  # of the hub


def test_method_on_the_command_line_starts_at_the_working_directory(folders):
    (folders / "other.yaml").write_text(PAGE.replace("weight.py", "pages/weight.py"))
    checked = load_run(folders, "method=./other.yaml")
    assert checked.problems == ()
    assert checked.spec.losses["imitate"].weight.file == "../pages/weight.py"


def test_linked_spec_has_one_base(folders, tmp_path):
    load_run(folders)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/run.yaml"
    link.symlink_to(folders / "specs/run.yaml")
    checked = load_spec(link)
    assert checked.problems == ()
    assert checked.base == folders / "specs"


def test_show_prints_what_each_path_means(folders):
    checked = load_run(folders, "data.source.path=data/rows.jsonl", "model.path=acme/model")
    shown = {line.split("#")[0].strip(): line for line in annotated(checked, show_paths=True).splitlines()}
    assert shown['path: "../data/rows.jsonl"'].endswith(f"<command line>:1 → {folders}/data/rows.jsonl")
    assert shown['path: "acme/model"'].endswith("<command line>:2 → a model of the hub")
    assert shown['file: "../pages/weight.py"'].endswith(f"page.yaml:3 → {folders}/pages/weight.py")
    assert shown['folder: "runs"'].endswith(f"default → {folders}/runs")
    assert str(folders) not in annotated(checked)


def test_resolved_spec_means_the_same_wherever_one_stands(folders, monkeypatch):
    checked = load_run(folders, "data.source.path=data/rows.jsonl")
    stored, base = folders / "resolved.yaml", checked.base
    stored.write_text(annotated(checked))
    monkeypatch.chdir("/")
    again = load_spec(stored, base=base)
    assert again.spec == checked.spec
    assert data_file(again) == folders / "data/rows.jsonl"
