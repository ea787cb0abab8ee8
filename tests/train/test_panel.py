"""A panel beside the task: evaluated at both ends, never trained on, its start scores cached."""

import json

import pytest
from attrs import evolve
from tinyruns import inline, lines, make_spec, metrics, read_status, silent_console, train, with_evaluation

from sdkit.language import specs
from sdkit.language.errors import BadData
from sdkit.runs import model_card, retention
from sdkit.runs.compare_text import compare
from sdkit.runs.history import read_run

OWN = specs.PanelSuite(
    name="own", data=inline(4, 2), score="number", decoding=specs.Table({"greedy": specs.Decoding(temperature=0.0)})
)
INSTRUCTIONS = specs.InstructionSuite(size=5, max_new_tokens=4)
REASONING = specs.ReasoningSuites(size=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def spec(tiny_folder):
    """Two steps with a panel of three entries; two of its own suite's prompts are training rows too."""
    small = with_evaluation(make_spec(tiny_folder), teacher_lift=0, panel=(INSTRUCTIONS, REASONING, OWN), every=1)
    return evolve(small, training=evolve(small.training, steps=2))


@pytest.fixture(scope="module")
def runs(spec, tmp_path_factory):
    """The same run twice, with one cache, and what the second prints."""
    folder = tmp_path_factory.mktemp("panel")
    console = silent_console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDKIT_CACHE", str(folder / "cache"))
        first = train(spec, folder / "first")
        second = train(spec, folder / "second", console)
    return first, second, console.file.getvalue()


def test_panel_is_evaluated_at_start_and_end_only(runs):
    suites = [{record["suite"] for record in lines(runs[0] / f"evaluations/step_{n:06d}.jsonl")} for n in range(3)]
    panel = {"instructions", "own", *(f"reasoning_{name}" for name in TASKS)}
    assert suites == [{"sums", "more"} | panel, {"sums", "more"}, {"sums", "more"} | panel]
    assert [line["step"] for line in metrics(runs[0]) if "eval/retention" in line] == [0, 2]


TASKS = ("chain_sum", "letter_counting", "leg_counting", "needle_haystack", "number_sequence", "syllogism")


def test_prompts_of_the_panel_are_not_trained_on(runs):
    rollouts = [record for n in range(2) for record in lines(runs[0] / f"rollouts/step_{n:06d}.jsonl")]
    assert {record["row"] for record in rollouts} == {0, 1}  # the suite `own` has the prompts of the other four


def test_a_panel_with_every_training_row_is_refused(spec, tmp_path):
    everything = evolve(OWN, data=inline(6))
    refused = evolve(spec, evaluation=evolve(spec.evaluation, panel=(everything,)))
    with pytest.raises(BadData, match="every training row is held out") as error:
        train(refused, tmp_path / "run")
    assert error.value.path == ("data",)


def test_start_scores_come_from_the_cache_and_are_the_same(runs):
    first, second, printed = runs
    assert "panel: scores of instructions, reasoning, own are cached from an earlier run" in printed
    assert metrics(first) == metrics(second)
    for step in (0, 2):
        name = f"evaluations/step_{step:06d}.jsonl"
        assert lines(first / name) == lines(second / name)


def test_cache_holds_one_file_of_json_for_each_suite_and_nothing_else(runs):
    files = [path for path in (runs[0].parent / "cache" / "scores").rglob("*") if path.is_file()]
    assert len(files) == 1 + len(TASKS) + 1
    assert all(json.loads(path.read_text())["facts"]["weights"] for path in files)


def test_run_reports_new_skill_against_retention(runs):
    run = runs[0]
    assert read_status(run)["state"] == "done"
    records = {record["figure"]: record for record in json.loads((run / "retention.json").read_text())}
    assert list(records) == ["new skill", "retention", "instructions", "reasoning", "own"]
    entries = [records[name]["after"][0] for name in ("instructions", "reasoning", "own")]
    assert records["retention"]["after"][0] == pytest.approx(sum(entries) / 3)
    assert records["retention"]["n"] == 5 + 2 * len(TASKS) + 4
    last = [line for line in metrics(run) if "eval/retention" in line][-1]
    assert last["eval/retention"] == pytest.approx(records["retention"]["after"][0])
    assert last["eval/new_skill"] == pytest.approx(records["new skill"]["after"][0])
    assert "new skill and retention" in runs[2]


def test_compare_and_model_card_show_retention(runs, spec, tmp_path):
    console = silent_console()
    compare([runs[0], runs[1]], console, tmp_path / "plot.png", "steps", None)
    printed = console.file.getvalue()
    assert "new skill and retention" in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    verdicts = printed.split("one run per setting")[0].split("new skill and retention")[1]
    assert "reasoning_syllogism" not in verdicts  # its change stands in the table of retention
    card = model_card.write(spec, runs[0], runs[0], adapter=False) if (runs[0] / "provenance.json").is_file() else ""
    assert "## New skill and retention" in card


def test_retention_of_a_run_directory_is_that_of_the_run(runs):
    run = read_run(runs[0], "run")
    start, end = run.evaluated(run.points[0]), run.evaluated(run.points[-1])
    recorded = {record["figure"]: record["change"] for record in json.loads((runs[0] / "retention.json").read_text())}
    again = {name: change["change"] for name, change in retention.changes(start, end).items()}
    assert {name: [i.mean, i.low, i.high] for name, i in again.items()} == recorded
