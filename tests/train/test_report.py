"""Lines on the console: each fits a terminal of 80 columns and names what it shows."""

import pytest
from tinyruns import inline

from sdkit.language.specs import EvaluationSpec, Suite, Table
from sdkit.runs.evaluations import EvaluationResult
from sdkit.train.console_lines import LOG_LINE, evaluation_lines, step_line
from sdkit.train.time_left import TimeLeft

METRICS = {
    "loss": 2.3456,
    "grad_norm": 13.456,
    "skipped_steps": 0.0,
    "rollout/completion_tokens": 1234.5,
    "time/step": 12.34,
    "time/tokens_per_second": 412.3,
    "time/trained_tokens_per_second": 902.6,
    "memory/peak_gib": 3.21,
}


def test_step_line_has_the_main_figures():
    line = step_line(3, 120, METRICS | {"reward/right": 0.25}, 120)
    expected = "step 3/120  loss 2.3456  grad 13.46  length 1234.5  right 0.25  412/903 tok/s  3.2 GiB  12.3 s"
    assert line.plain == expected


@pytest.mark.parametrize(
    ("room", "left_out"),
    [
        (100, ()),
        (88, ("length",)),
        (76, ("length", "b 0")),
        (66, ("length", "b 0", "GiB")),
        (60, ("length", "b 0", "GiB", "tok/s")),
        (44, ("length", "b 0", "GiB", "tok/s", "a 0")),
        (20, ("length", "b 0", "GiB", "tok/s", "a 0")),
    ],
)
def test_narrow_step_line_leaves_out_the_least_important(room, left_out):
    line = step_line(3, 120, METRICS | {"reward/a": 0.25, "reward/b": 0.5}, room).plain
    assert len(line) <= max(room, 44)
    shown = ("step 3/120", "loss 2.3456", "grad 13.46", "length", "a 0", "b 0", "tok/s", "GiB", "12.3 s")
    assert [part for part in shown if part not in line] == [part for part in shown if part in left_out]


@pytest.mark.parametrize("rewards", [0, 1, 3, 12])
@pytest.mark.parametrize("changes", [{}, {"skipped_steps": 1.0}, {"loss": 12345.6789, "grad_norm": 98765.4321}])
def test_step_line_with_a_time_fits_80_columns(rewards, changes):
    scores = {f"reward/reward_{i}": 0.5 for i in range(rewards)}
    line = step_line(1000, 99999, METRICS | scores | changes, LOG_LINE)
    assert line.cell_len <= LOG_LINE == 80 - len("18:03:12 ")
    assert line.plain.endswith("skipped" if "skipped_steps" in changes else "12.3 s")
    assert f"grad {(METRICS | changes)['grad_norm']:.2f}" in line.plain


def test_step_line_of_completions_from_the_data_has_no_sampling_rate():
    assert "  –/903 tok/s  " in step_line(1, 9, METRICS, 80, sampled=False).plain


def test_step_line_shows_the_memory_of_the_device_and_short_rates():
    metrics = METRICS | {"memory/device_reserved_gib": 71.26, "time/tokens_per_second": 25123.4}
    assert "25k/903 tok/s  71.3 GiB" in step_line(1, 9, metrics, 80).plain


def test_step_without_an_update_says_so():
    missing = ("loss", "grad_norm", "time/trained_tokens_per_second")
    metrics = {name: value for name, value in METRICS.items() if name not in missing}
    line = step_line(1, 2, metrics, 80).plain
    assert "no rollout kept, no update" in line
    assert "412/– tok/s" in line


def test_time_left_counts_steps_and_evaluations():
    now = 0.0
    left = TimeLeft(
        10,
        EvaluationSpec(suites=Table({"sums": Suite(data=inline(), score="right")}), every=4),
        100.0,
        clock=lambda: now,
    )
    assert left.seconds() is None
    left.step(1, 50.0)
    assert left.seconds() == 9 * 50 + 3 * 100  # after steps 4, 8 and 10
    left.step(2, 10.0)  # the first step was slow
    left.step(3, 20.0)
    assert left.seconds() == 7 * 15 + 3 * 100
    left.step(4, 15.0)
    left.evaluation(30.0)
    assert left.seconds() == 6 * 15 + 2 * 30
    now = 40.0
    assert left.seconds() == 6 * 15 + 2 * 30 - 40
    left.step(10, 15.0)
    assert left.seconds() == 0


def test_log_says_now_and_then_how_long_a_run_takes():
    now = 0.0
    left = TimeLeft(100, None, clock=lambda: now)
    due = []
    for step in range(1, 101):
        now += 30.0
        left.step(step, 30.0)
        if left.due():
            due.append(step)
    assert due == [2, 22, 42, 62, 82]


def evaluation(*keys):
    return EvaluationResult(scores=dict.fromkeys(keys, (1.0, 0.0)), records=[], tokens=0)


def test_evaluation_of_one_suite_is_one_line():
    (line,) = evaluation_lines(2, evaluation(("sums", "greedy", "right")), 3.2)
    assert line == "[cyan]evaluation after step 2[/]: greedy/right 0.500 [dim](3 s)[/]"


def test_every_suite_has_a_line_with_its_name():
    keys = ("sums", "greedy", "right"), ("sums", "drawn", "right"), ("words", "greedy", "right")
    first, second = evaluation_lines(2, evaluation(*keys), 3.2)
    assert first == "[cyan]evaluation after step 2, sums[/]: greedy/right 0.500, drawn/right 0.500"
    assert second.startswith("[cyan]evaluation after step 2, words[/]: greedy/right 0.500")
