"""`sdkit report`: what the page shows, what it says is missing, and that text of models stays text."""

import json
import re
import shutil
from html import unescape
from xml.etree import ElementTree

import pytest
from reportruns import (
    HOSTILE,
    change_setting,
    copy_run,
    damage,
    make_hostile,
    make_long,
    make_seeds,
    make_sequence,
    make_set,
    trajectory_run,
)
from run_directories import score_of, write_run
from tinyruns import lines

from sdkit.language.errors import UnreadableInput
from sdkit.language.load import load_spec
from sdkit.language.method_pages import find_pages
from sdkit.report import completions, formula, page
from sdkit.report.completions import Texts
from sdkit.report.records import read_contents
from sdkit.report.sampling import spread
from sdkit.runs.run_sets import read_set
from sdkit.runs.seed_runs import read_seeds


@pytest.fixture(scope="module")
def text(report_run, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "report.html"
    page.write_report([report_run], target, "tokens")
    return target.read_text(encoding="utf-8")


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text)[1])


def subjects_of(text):
    return [subject["name"] for subject in data_of(text)["subjects"]]


def rendered(*runs):
    return page.render(read_contents(runs))


def table_of(text, section):
    """The cells of the first table of a section."""
    part = text[text.index(f'<section id="{section}">') :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row.replace("\xa0", " ")) for row in body.split("<tr")[1:]]


def test_scores_are_those_of_the_metrics(text, report_run):
    evaluated = [line for line in lines(report_run / "metrics.jsonl") if "eval/score" in line]
    rows = {tuple(row[:3]): row for row in table_of(text, "scores")}
    assert len(rows) == 8  # two suites: two rewards under two decodings, and one; two samples have pass@1 and pass@2
    for key, row in rows.items():
        name = "eval/" + "/".join(key)
        for cell, line in ((row[3], evaluated[0]), (row[4], evaluated[-1])):
            assert cell == f"{line[name]:.3f} [{line[f'{name}_low']:.3f}, {line[f'{name}_high']:.3f}]"
        assert float(row[5]) == pytest.approx(evaluated[-1][name] - evaluated[0][name], abs=6e-4)


def test_trajectories_have_a_section_by_turn(tmp_path):
    run = trajectory_run(tmp_path / "run")
    text = rendered(run)
    rows = table_of(text, "turns")
    assert [row[2] for row in rows] == ["1", "2", "turns to success"]
    assert [cell[:5] for cell in rows[1][3:]] == ["0.200", "0.600", "0.200", "0.200"]
    assert rows[2][3:5] == ["2.00", "1.17"]
    charts = [chart for chart in data_of(text)["charts"] if chart["place"] == "turn-charts"]
    assert [chart["kind"] for chart in charts] == ["stacked", "lines"]
    assert charts[0]["metrics"] == ["trajectory/ending_done", "trajectory/ending_max_turns"]
    assert 'href="#turns"' in text


def test_run_of_single_turns_has_no_section_by_turn(text):
    assert 'id="turns"' not in text


def test_panel_is_shown_against_the_new_skill(tmp_path):
    for name, letters in (("keeps", 0.8), ("loses", 0.2)):
        start = {("sums", "greedy", "right"): score_of(0.1), ("letters", "greedy", "right"): score_of(0.8)}
        end = {("sums", "greedy", "right"): score_of(0.5), ("letters", "greedy", "right"): score_of(letters)}
        write_run(tmp_path / name, {0: start, 2: end})
    text = rendered(tmp_path / "keeps", tmp_path / "loses")
    rows = table_of(text, "retention")
    assert [row[:2] for row in rows[:3]] == [["keeps", "new skill"], ["", "retention"], ["", "reasoning"]]
    assert rows[4][1] == "retention"
    assert rows[4][4] == "-0.600"
    assert rows[4][-1] == "lost"
    assert "<td>keeps − loses</td><td>retention</td>" in text
    assert [(one["name"], round(one["x"]["mean"], 3)) for one in data_of(text)["retention"]] == [
        ("keeps", 0.0),
        ("loses", -0.6),
    ]


def test_curves_hold_every_metric(text, report_run):
    written = lines(report_run / "metrics.jsonl")
    [run] = data_of(text)["runs"]
    assert run["steps"] == [line["step"] for line in written]
    for name, column in run["metrics"].items():
        assert column == [line.get(name) for line in written]
    assert {name for line in written for name in line} - {"step"} == set(run["metrics"])


def test_held_out_completions_are_those_of_the_evaluations(text, report_run):
    data = data_of(text)
    [part] = [p for p in data["completions"][0]["held_out"] if (p["suite"], p["decoding"]) == ("sums", "drawn")]
    for place, step in enumerate(part["steps"]):
        records = lines(report_run / f"evaluations/step_{step:06d}.jsonl")
        for prompt in part["prompts"]:
            of_prompt = [
                r for r in records if (r["suite"], r["decoding"], r["row"]) == ("sums", "drawn", prompt["row"])
            ]
            assert data["texts"][prompt["prompt"]] == of_prompt[0]["prompt"]
            shown = [(data["texts"][s["text"]], s["scores"]) for s in prompt["samples"][place]]
            assert shown == [(page.visible(r["completion"]), r["scores"]) for r in of_prompt]


def test_teacher_prompts_of_held_out_rows_are_rendered_again(text, report_run, tmp_path):
    data = data_of(text)
    [part] = [p for p in data["completions"][0]["held_out"] if (p["suite"], p["decoding"]) == ("sums", "greedy")]
    assert [data["texts"][p["prompt"]] for p in part["prompts"]] == [f"What is {i} + {i}?" for i in range(100, 104)]
    for i, prompt in enumerate(part["prompts"], start=100):
        assert f"What is {i} + {i}?\nExample: {i} + {i} = {2 * i}<|im_end|>" in data["texts"][prompt["teacher_prompt"]]
    run = copy_run(report_run, tmp_path / "changed")
    change_setting(run, "teacher", "sees", None)
    assert data_of(rendered(run))["completions"][0]["held_out"][0]["prompts"][0]["teacher_prompt"] is None


def test_rollouts_have_their_divergence(text, report_run, tiny_tokenizer):
    data = data_of(text)
    steps = data["completions"][0]["rollouts"]["steps"]
    assert [step["step"] for step in steps] == [1, 2]
    records = lines(report_run / "rollouts/step_000001.jsonl")
    assert [r["row"] for r in steps[1]["rollouts"]] == [r["row"] for r in records]
    first, shown = records[0], steps[1]["rollouts"][0]
    assert shown["scores"] == first["scores"]
    assert "".join(shown["pieces"]) == page.visible(tiny_tokenizer.decode(first["completion_ids"]))
    assert "Example:" in data["texts"][shown["teacher_prompt"]]
    assert max(shown["divergence"]) == max(first["token_divergence"])


def test_page_loads_nothing(text):
    own = unescape(
        re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    )  # Plotly names addresses that it does not ask for
    assert "default-src 'none'" in own
    assert "unsafe-eval" not in own
    assert not re.search(r"\bsrc=|<link|@import|url\(|https?://", own)


def test_text_of_models_cannot_leave_its_place(report_run, tmp_path):
    run = make_hostile(report_run, tmp_path / "hostile")
    text = rendered(run)
    assert text.count("<script") == rendered(report_run).count("<script")
    assert HOSTILE not in text
    assert "<img" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    shown = data_of(text)["texts"]
    assert any("</script><script>" in one and "␀" in one and "⟨U+202E⟩" in one for one in shown)


def test_invisible_characters_are_named():
    assert page.visible("a\x00\x1b[31m\r\n\tb\x7f\x85\u200b\u202eé🙂") == "a␀␛[31m␍\n\tb␡⟨U+0085⟩⟨U+200B⟩⟨U+202E⟩é🙂"


def test_run_that_has_just_begun_gives_a_page(report_run, tmp_path):
    run = copy_run(report_run, tmp_path / "begun")
    for name in ("evaluations", "rollouts", "samples"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 0, "reason": "out of memory"}))
    text = rendered(run)
    for words in (
        "failed after step 0: out of memory",
        "no step is on record yet",
        "No held-out prompts were evaluated",
    ):
        assert words in text
    assert data_of(text)["completions"][0]["rollouts"]["problem"] == "this run has recorded no rollouts"


def test_tokenizer_of_the_trained_model_reads_rollouts(report_run, tmp_path):
    run = shutil.copytree(report_run, tmp_path / "moved")
    change_setting(run, "model", "path", str(tmp_path / "gone"))
    assert data_of(rendered(run))["completions"][0]["rollouts"]["steps"]
    shutil.rmtree(run / "model")
    assert "cannot be loaded" in data_of(rendered(run))["completions"][0]["rollouts"]["problem"]


def test_several_runs_show_what_differs(report_run, tmp_path):
    other = shutil.copytree(report_run, tmp_path / "other")
    change_setting(other, "optimizer", "lr", 0.5)
    text = rendered(report_run, other)
    assert ["optimizer.lr", "0.001", "0.5"] in table_of(text, "settings")
    assert "no significant difference" in text
    assert len(table_of(text, "scores")) == 8
    assert subjects_of(text) == [report_run.name, "other"]


def test_seeds_are_one_subject(report_run, tmp_path):
    folder = make_seeds(report_run, tmp_path / "seeds", begun=2, waiting=1)
    text = rendered(folder)
    data = data_of(text)
    assert subjects_of(text) == ["seeds"]
    assert [(run["name"], run["subject"]) for run in data["runs"]] == [("seeds/seed_0", 0), ("seeds/seed_1", 0)]
    assert "not started: seed_2" in text
    assert "95 % intervals over prompts and seeds" in text
    assert len(table_of(text, "scores")) == 4
    points = read_seeds(read_set(folder), "seeds").points
    lows = [point.scores["more", "sampled", "number"].low for point in points]
    assert data["subjects"][0]["bands"]["eval/more/sampled/number"]["low"] == lows
    assert dict(map(tuple, table_of(text, "cost")))["runs"] == "2"


def test_points_of_a_sweep_are_subjects(report_run, tmp_path):
    point = make_seeds(report_run, tmp_path / "sweep" / "lr=0.1", begun=2)
    make_set(tmp_path / "sweep", "sweep", {"lr=0.1": ["optimizer.lr=0.1"], "lr=0.2": ["optimizer.lr=0.2"]})
    shutil.copytree(point / "seed_0", tmp_path / "sweep" / "lr=0.2")
    change_setting(tmp_path / "sweep" / "lr=0.2", "optimizer", "lr", 0.2)
    text = rendered(tmp_path / "sweep")
    assert subjects_of(text) == ["sweep/lr=0.1", "sweep/lr=0.2"]
    assert ["optimizer.lr", "0.001", "0.2"] in table_of(text, "settings")


def test_sequence_has_its_matrix(report_run, tmp_path):
    folder = make_sequence(report_run, tmp_path / "both")
    text = rendered(folder, make_sequence(report_run, tmp_path / "again"))
    evaluated = [line for line in lines(report_run / "metrics.jsonl") if "eval/score" in line]
    for row, line in zip(table_of(text, "sequences"), (evaluated[0], evaluated[-1], evaluated[-1]), strict=True):
        names = ("eval/sums/greedy/right", "eval/more/greedy/number")
        assert row[1:] == [f"{line[n]:.3f} [{line[f'{n}_low']:.3f}, {line[f'{n}_high']:.3f}]" for n in names]
    assert subjects_of(text) == ["both/first", "both/second", "again/first", "again/second"]
    assert [plot["stages"] for plot in data_of(text)["sequences"]] == [["the start", "first", "second"]] * 2
    assert "both − again" in text
    (folder / "second" / "status.json").write_text('{"state": "stopped", "step": 1}')
    assert "transfer and forgetting are not known yet" in rendered(folder)


def test_seeds_of_a_sequence_are_one(report_run, tmp_path):
    for seed in ("seed_0", "seed_1"):
        make_sequence(report_run, tmp_path / "seeds" / seed)
    make_set(tmp_path / "seeds", "seeds", {"seed_0": [], "seed_1": []})
    text = rendered(tmp_path / "seeds")
    assert subjects_of(text) == ["seeds/first", "seeds/second"]
    assert "seeds, 2 seeds: score of every suite after every stage" in text


def test_set_that_has_not_begun_is_refused(tmp_path):
    make_set(tmp_path / "sweep", "sweep", {"lr=0.1": []})
    with pytest.raises(UnreadableInput, match="no run has begun"):
        rendered(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "{\n", "metrics.jsonl:1: not a JSON object"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl:1: not a line of a run"),
        ("warnings.jsonl", "[1]\n", "warnings.jsonl:1: not a line of a run"),
        ("rollouts/step_000000.jsonl", '{"row": 1}\n', "step_000000.jsonl: not the rollouts of a step"),
        ("evaluations/step_000000.jsonl", '{"row": 1}\n', "evaluations/step_000000.jsonl"),
        ("provenance.json", "{", "provenance.json"),
    ],
)
def test_damaged_files_are_named(report_run, tmp_path, file, content, message):
    run = damage(report_run, tmp_path / "damaged", file, content)
    with pytest.raises(UnreadableInput, match=re.escape(message)):
        rendered(run)


def test_command_names_its_page(sdkit, report_run, tmp_path):
    target = tmp_path / "report.html"
    assert sdkit("report", report_run, "--to", target)[:2] == (0, f"report: {target}\n")
    assert "must end in .html" in sdkit("report", report_run, "--to", tmp_path / "report.pdf")[2]
    assert "is not a run directory" in sdkit("report", tmp_path, "--to", target)[2]


def test_long_texts_and_many_steps_are_reduced():
    texts = Texts()
    number = texts.add("a" * 99_999)
    assert (texts.add("a" * 99_999), len(texts.texts)) == (number, 1)
    assert "87,999 characters left out" in texts.texts[0]
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 4) == [0, 1, 2]
    rollout = {"pieces": ["x"] * 20, "prompt": "a", "teacher_prompt": None}
    steps = [{"step": i, "rollouts": [rollout] * 8} for i in range(100)]
    completions._reduce(steps, 20_000)
    assert len(json.dumps(steps)) < 21_000
    assert (steps[0]["step"], steps[-1]["step"], len(steps)) == (0, 99, 100)


@pytest.mark.parametrize("name", [page.name for page in find_pages()])
def test_objective_of_every_method_is_a_formula(name):
    spec = load_spec(name).spec
    elements = [ElementTree.fromstring(line) for line in formula.formulas(spec)]
    assert len(elements) == len(spec.losses) + 1
    text = "".join(elements[0].itertext())
    assert all(term in text for term in spec.losses)


def test_formula_of_a_divergence_has_its_direction():
    spec = load_spec("sdft").spec
    assert "".join(ElementTree.fromstring(formula.formulas(spec)[1]).itertext()).endswith("KL(Tt‖St)")


@pytest.mark.full
def test_page_of_a_long_run_is_below_30_mb(report_run, tmp_path):
    run = shutil.copytree(report_run, tmp_path / "long")
    make_long(run, steps=1000, rollouts=16, tokens=600)
    text = rendered(run)
    steps = data_of(text)["completions"][0]["rollouts"]["steps"]
    assert [step["step"] for step in steps] == list(range(1, 1001))
    assert len(data_of(text)["runs"][0]["steps"]) >= 1000
    assert len(text.encode()) < 30_000_000


def test_runs_of_one_name_are_told_apart_by_their_parents(report_run, tmp_path):
    folders = [make_seeds(report_run, tmp_path / name, begun=1) / "seed_0" for name in ("a", "b")]
    assert subjects_of(rendered(*folders)) == ["a/seed_0", "b/seed_0"]
    with pytest.raises(UnreadableInput, match="is named twice"):
        rendered(report_run, report_run)
