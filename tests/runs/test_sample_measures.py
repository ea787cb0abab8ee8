"""pass@k, diversity and repetition of completions, and how evaluations report them."""

from itertools import combinations

import pytest

from sdkit.language.metric_names import attempts
from sdkit.runs.evaluations import main_keys, read_back
from sdkit.runs.intervals import STUDENT
from sdkit.runs.sample_measures import completion_measures, distinct, pass_at, prompt_measures
from sdkit.runs.score_tables import measure_changes, measure_changes_table, measure_records

RIGHT, ENTROPY = ("sums", "drawn", "right"), ("sums", "drawn", "entropy")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("passed", [0, 1, 3, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_success(k, passed):
    draws = list(combinations([True] * passed + [False] * (5 - passed), k))
    assert pass_at(k, passed, 5) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at(1, 1, 10**4) == pytest.approx(1e-4, rel=1e-12)
    assert attempts(10) == [1, 2, 4, 8, 10]
    with pytest.raises(ValueError, match="pass@3 of 1 in 2 samples"):
        pass_at(3, 1, 2)


def test_distinct_counts_different_n_grams():
    assert distinct(1, [[1, 2], [1, 3]]) == 3 / 4
    assert distinct(2, [[1, 2, 1, 2]]) == 2 / 3
    assert distinct(2, [[1], []]) == 1
    assert prompt_measures([[1, 1], [1, 1]]) == {"distinct_1": 1 / 4, "distinct_2": 1 / 2}


def test_measures_of_one_completion():
    measures = completion_measures([7] * 5, [-0.5] * 4 + [0.0], finished=False)
    assert measures == {"completion_tokens": 5, "cut_at_limit": 1, "self_repetition": 0.5, "entropy": 0.4}
    assert "entropy" not in completion_measures([7], None, finished=True)


def evaluation(*prompts, entropy=1.0):
    """The result for two prompts or more; each is a list of scores, one for a sample."""
    return read_back(
        [
            {
                "suite": "sums",
                "decoding": "drawn",
                "row": row,
                "prompt": f"prompt {row}",
                "scores": {"right": score},
                "passed": score >= 1,
                "measures": {"entropy": entropy + row, "cut_at_limit": 0.0},
            }
            for row, scores in enumerate(prompts)
            for score in scores
        ]
    )


def test_scores_of_several_samples_have_pass_at_k():
    result = evaluation([1, 0, 0, 0], [0.5, 0.5, 0, 0])
    assert result.scores == {
        RIGHT: (0.25, 0.25),
        ("sums", "drawn", "pass_at_1"): (0.25, 0),
        ("sums", "drawn", "pass_at_2"): (0.5, 0),
        ("sums", "drawn", "pass_at_4"): (1, 0),
    }
    assert main_keys(result.scores) == [RIGHT, ("sums", "drawn", "pass_at_4")]
    assert list(evaluation([1], [0]).scores) == [RIGHT]
    metrics = result.metrics(RIGHT)
    assert metrics["eval/sums/drawn/pass_at_2"] == 0.25
    assert metrics["eval/sums/drawn/pass_at_2_low"] < 0.25 < metrics["eval/sums/drawn/pass_at_2_high"]
    assert metrics["eval/sums/drawn/entropy"] == 1.5


def test_change_of_a_measure_is_paired():
    before, after = evaluation([1], [0], [0], entropy=0.25), evaluation([1], [0], [0], entropy=0.1)
    change = measure_changes(before, after)[ENTROPY]["change"]
    assert (change.mean, change.n, change.method) == (pytest.approx(-0.15), 3, STUDENT)
    records = {r["measure"]: r for r in measure_records(after)}
    assert records["entropy"]["mean"] == pytest.approx(1.1)
    assert records["cut_at_limit"]["high"] < 1
    table = measure_changes_table(measure_changes(before, after))
    assert table is not None
    assert [column.header for column in table.columns] == ["suite", "decoding", "cut", "entropy"]
    assert list(table.columns[3].cells) == ["1.250 → 1.100 *"]


def test_records_of_an_older_version_have_no_measures():
    records = [{"suite": "s", "decoding": "d", "row": 0, "prompt": "p", "scores": {"right": 1.0}} for _ in range(2)]
    assert list(read_back(records).scores) == [("s", "d", "right")]
    assert measure_changes_table(measure_changes(read_back(records), evaluation([1], [0]))) is None
