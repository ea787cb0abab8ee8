"""Weighted rewards and program tests in an evaluation, with their feedback."""

import pytest
from attrs import evolve
from tinyruns import inline, make_spec, with_evaluation

from sdkit.language.specs import (
    Decoding,
    FileReward,
    InlineSource,
    NumberReward,
    PythonTests,
    Suite,
    Table,
    WeightedReward,
    WholeText,
)

USER_FILE = "def length(completion, row):\n    return len(completion) / 100, 'say less'\n"


def test_parts_of_a_reward_are_measured_and_feedback_is_stored(tiny_folder, tmp_path):
    from sdkit.distributed import zero
    from sdkit.train.evaluate import evaluate, headline
    from sdkit.train.run import open_run

    (tmp_path / "mine.py").write_text(USER_FILE)
    rewards = {
        "total": WeightedReward(parts=Table({"runs": 2.0, "length": -1.0})),
        "runs": NumberReward(),
        "length": FileReward(file="mine.py", function="length"),
    }
    suite = Suite(data=inline(3, 100), score="total", decoding=Table({"greedy": Decoding(temperature=0.0)}))
    spec = with_evaluation(make_spec(tiny_folder), suites=Table({"sums": suite}))
    trainer = open_run(evolve(spec, rewards=Table(rewards)), tmp_path)
    try:
        evaluation = evaluate(trainer.sampler, spec.evaluation, 0)
        metrics = evaluation.metrics(headline(spec.evaluation))
    finally:
        trainer.close()
        zero.stop()
    names = ["total", "total/runs", "total/length"]
    assert [key[2] for key in evaluation.scores] == names
    total, runs, length = (evaluation.scores["sums", "greedy", name] for name in names)
    assert total == pytest.approx([2 * r - n for r, n in zip(runs, length, strict=True)])
    assert metrics["eval/score"] == metrics["eval/sums/greedy/total"]
    assert "eval/sums/greedy/total/length_low" in metrics
    for record in evaluation.records:
        assert set(record["scores"]) == set(names)
        assert record["feedback"]["total"].endswith("say less")


def test_programs_are_tested_in_a_run(tiny_folder, tmp_path):
    from sdkit.distributed import zero
    from sdkit.language.errors import BadData
    from sdkit.train.evaluate import evaluate
    from sdkit.train.run import open_run

    reward = PythonTests(tests="answer", extract=WholeText(), isolation="without_namespaces")
    suite = Suite(data=inline(3, 100), score="passes", decoding=Table({"greedy": Decoding(temperature=0.0)}))
    spec = with_evaluation(make_spec(tiny_folder), suites=Table({"sums": suite}))
    spec = evolve(spec, rewards=Table({"passes": reward}))
    trainer = open_run(spec, tmp_path)
    try:
        result = evaluate(trainer.sampler, spec.evaluation, 0)
    finally:
        trainer.close()
        zero.stop()
    # A model with random weights writes no Python, so every program fails.
    assert list(result.scores["sums", "greedy", "passes"]) == [0.0] * 3
    assert all("Test 1 of 1 failed" in r["feedback"]["passes"] for r in result.records)

    rows = tuple(Table({**row, "answer": "{}"}) for row in suite.data.source.rows)
    without_tests = evolve(suite, data=evolve(suite.data, source=InlineSource(rows=rows)))
    spec = evolve(spec, evaluation=evolve(spec.evaluation, suites=Table({"sums": without_tests})))
    with pytest.raises(BadData, match=r"row 0: tests in the column 'answer': a table needs.*\nrow 1"):
        open_run(spec, tmp_path)
