"""Tasks of lm-eval in a panel: scores of a local task, and what is said without the package."""

import importlib.util
import math
from pathlib import Path

import pytest
from attrs import evolve
from tinyruns import lines, make_spec, metrics, train, with_evaluation

from sdkit.language import panel
from sdkit.language.errors import BadData, BadEnvironment, render
from sdkit.language.load import load_spec
from sdkit.language.specs import LmEvalTasks
from sdkit.train import lm_eval_tasks

FOLDER = Path(__file__).resolve().parents[1] / "ok" / "lm_eval"
CAPITALS = LmEvalTasks(tasks=("capitals",), folder=str(FOLDER))
with_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def document(number, filter_name, **scores):
    return {
        "doc_id": number,
        "arguments": [("The capital of France is", " Paris")],
        "filtered_resps": ["Paris"],
        "filter": filter_name,
        "metrics": list(scores),
        **scores,
    }


def test_record_has_every_metric_that_is_a_number_under_each_filter():
    documents = [document(0, "none", acc=1.0, perplexity=(1.0, 2)), document(0, "flexible-extract", acc=0)]
    [record] = lm_eval_tasks._records("knowledge", "a.task", documents)
    assert record["scores"] == {"acc": 1.0, "acc_flexible-extract": 0.0}
    assert (record["suite"], record["panel"], record["row"]) == ("a_task", "knowledge", 0)
    with pytest.raises(BadData, match="task words has no score for each document, only 'bleu'"):
        list(lm_eval_tasks._records("knowledge", "words", [document(0, "none", bleu=("a", "b"))]))


def test_metrics_of_which_less_is_better_are_left_out():
    kept = lm_eval_tasks._with_better_metrics(document(0, "none", acc=1.0, bits=2.0), {"acc": True, "bits": False})
    assert kept["metrics"] == ["acc"]


@pytest.mark.parametrize(
    ("kind", "package"), [("reasoning", "reasoning-gym"), ("{kind: lm_eval, tasks: [x]}", "lm-eval")]
)
def test_missing_package_is_a_problem_of_the_spec(monkeypatch, tmp_path, kind, package):
    monkeypatch.setattr(panel, "is_installed", lambda name: False)
    good = (FOLDER.parent / "unknown_reward.yaml").read_text().replace("methods/page.yaml", "sdft")
    path = tmp_path / "run.yaml"
    path.write_text(good + f"  panel: [{kind}]\n")
    checked = load_spec(path)
    text = render(checked.problems, checked.texts)
    assert f"needs a package that is missing: {package} [panel_source]" in text
    assert f"run.yaml:{len(good.splitlines()) + 1}:" in text


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_evaluation_without_the_package_says_what_to_install():
    with pytest.raises(BadEnvironment, match="lm_eval need a package that is missing") as error:
        lm_eval_tasks.evaluate_tasks(CAPITALS, FOLDER, None, None)
    assert error.value.hint == "pip install lm-eval"


def test_facts_change_with_a_file_and_with_the_settings(tmp_path):
    (tmp_path / "task.yaml").write_text("task: x\n")
    first = lm_eval_tasks.task_facts(CAPITALS, tmp_path)
    assert lm_eval_tasks.task_facts(CAPITALS, tmp_path) == first
    assert lm_eval_tasks.task_facts(evolve(CAPITALS, limit=3), tmp_path) != first
    (tmp_path / "task.yaml").write_text("task: y\n")
    assert lm_eval_tasks.task_facts(CAPITALS, tmp_path) != first
    assert lm_eval_tasks.task_facts(CAPITALS, None) is None  # the hub's data may change


@with_lm_eval
def test_scores_are_the_likeliest_choices_and_the_random_streams_go_on(tiny_folder, tmp_path, monkeypatch):
    """A run with the tasks trains as a run without; the scores are those of the model's own log-probabilities."""
    monkeypatch.setenv("SDKIT_CACHE", str(tmp_path / "cache"))
    spec = with_evaluation(make_spec(tiny_folder), teacher_lift=0)
    spec = evolve(spec, training=evolve(spec.training, steps=1))
    beside = evolve(spec, evaluation=evolve(spec.evaluation, panel=(CAPITALS,)))
    plain, with_tasks = train(spec, tmp_path / "plain"), train(beside, tmp_path / "tasks")
    scores = {
        r["row"]: r["scores"]["acc"] for r in lines(with_tasks / "evaluations/step_000000.jsonl") if "panel" in r
    }
    assert scores == {number: float(right) for number, right in enumerate(_right_answers(tiny_folder))}
    kept = [{k: v for k, v in line.items() if "/capitals/" not in k} for line in metrics(with_tasks)]
    kept = [{k: v for k, v in line.items() if not k.startswith(("eval/new", "eval/ret"))} for line in kept]
    assert kept == metrics(plain)


@with_lm_eval
@pytest.mark.full  # lm-eval reads all of its task files
def test_unknown_task_is_named(tiny_folder, tmp_path):
    spec = with_evaluation(make_spec(tiny_folder), panel=(LmEvalTasks(tasks=("no_such_task",)),))
    with pytest.raises(BadData, match="lm-eval cannot run 'no_such_task'"):
        train(spec, tmp_path / "run")


def _right_answers(folder):
    """Whether the right capital is the likeliest, for each document."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for document in lines(FOLDER / "capitals.json"):
        totals = []
        for choice in document["choices"]:
            prompt = tokenizer(f"The capital of {document['country']} is").input_ids
            ids = tokenizer(f"The capital of {document['country']} is {choice}").input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        assert not math.isnan(totals[0])
        yield totals.index(max(totals)) == document["answer"]
