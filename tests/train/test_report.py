"""Lines on the console: each fits a terminal of 80 columns and names what it shows."""

import pytest

from sdkit.runs.evaluations import EvaluationResult
from sdkit.train.report import STEP_LINE, _evaluation_lines, _step_line

METRICS = {
    "loss": 2.3456,
    "grad_norm": 13.456,
    "skipped_steps": 0.0,
    "rollout/completion_tokens": 1234.5,
    "time/step": 12.34,
}


def test_step_line_has_the_main_figures():
    line = _step_line(3, 120, METRICS | {"reward/right": 0.25})
    assert line.plain == "step 3/120  loss 2.3456  grad 13.46  length 1234.5  right 0.25  12.3 s"


@pytest.mark.parametrize("rewards", [0, 1, 3, 12])
@pytest.mark.parametrize("changes", [{}, {"skipped_steps": 1.0}, {"loss": 12345.6789, "grad_norm": 98765.4321}])
def test_step_line_with_a_time_fits_80_columns(rewards, changes):
    scores = {f"reward/reward_{i}": 0.5 for i in range(rewards)}
    line = _step_line(1000, 99999, METRICS | scores | changes)
    assert line.cell_len <= STEP_LINE == 80 - len("18:03:12 ")
    assert line.plain.endswith("skipped" if "skipped_steps" in changes else "12.3 s")
    assert f"grad {(METRICS | changes)['grad_norm']:.2f}" in line.plain


def test_step_line_shows_that_rewards_are_left_out():
    scores = {f"reward/reward_{i}": 0.5 for i in range(12)}
    assert _step_line(1, 9, METRICS | scores).plain.endswith("  …  12.3 s")


def test_step_without_an_update_says_so():
    metrics = {name: value for name, value in METRICS.items() if name not in ("loss", "grad_norm")}
    assert "no rollout kept, no update" in _step_line(1, 2, metrics).plain


def evaluation(*keys):
    return EvaluationResult(scores=dict.fromkeys(keys, (1.0, 0.0)), records=[], tokens=0)


def test_evaluation_of_one_suite_is_one_line():
    (line,) = _evaluation_lines(2, evaluation(("sums", "greedy", "right")), 3.2)
    assert line == "[cyan]evaluation after step 2[/]: greedy/right 0.500 [dim](3 s)[/]"


def test_every_suite_has_a_line_with_its_name():
    keys = ("sums", "greedy", "right"), ("sums", "drawn", "right"), ("words", "greedy", "right")
    first, second = _evaluation_lines(2, evaluation(*keys), 3.2)
    assert first == "[cyan]evaluation after step 2, sums[/]: greedy/right 0.500, drawn/right 0.500"
    assert second.startswith("[cyan]evaluation after step 2, words[/]: greedy/right 0.500")
