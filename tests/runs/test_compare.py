"""`sdkit compare` on run directories made by hand: common budgets, significant differences, and the text."""

import json
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console
from run_directories import GREEDY, SPEC, right, score_of

from sdkit.language.errors import UnreadableInput
from sdkit.runs.compare import common_budget, differences, differing_evaluation, differing_settings, score_keys
from sdkit.runs.compare_text import compare
from sdkit.runs.intervals import paired_p_value, unpaired_difference, unpaired_p_value
from sdkit.runs.seed_runs import read_runs


def common_steps(a, b, axis="tokens"):
    budget = common_budget(*read_runs([a, b]), axis)
    return budget and tuple(point.step for point in budget.points)


def compared_scores(a, b, axis="tokens", score=None):
    runs = read_runs([a, b])
    return differences([common_budget(*runs, axis)], score_keys(runs, score))


def test_run_is_read(make_run):
    folder = make_run("one", {0: score_of(0.1), 2: score_of(0.3)}, tokens=50, seconds=4.0)
    (run,) = read_runs([folder])
    assert (run.name, run.state, run.headline) == ("one", "done", GREEDY)
    assert [(p.step, p.tokens, p.seconds) for p in run.points] == [(0, 0, 0), (2, 100, 8)]
    assert [p.at("steps") for p in run.points] == [0, 2]
    assert run.points[1].scores[GREEDY].mean == pytest.approx(0.3)
    assert run.per_prompt(run.points[1])[GREEDY] == score_of(0.3)


def test_evaluation_without_completions_is_left_out(make_run):
    folder = make_run("live", {0: score_of(0.1), 1: score_of(0.2), 2: score_of(0.3)})
    (folder / "evaluations" / "step_000002.jsonl").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (run,) = read_runs([folder])
    assert [p.step for p in run.points] == [0, 1]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"state": "running", "step": 7}, "unfinished, running or killed after step 7"),
        ({"state": "stopped", "step": 3, "reason": "requested\nmore"}, "stopped after step 3: requested"),
        ({"state": "failed", "step": 3, "reason": "boom"}, "failed after step 3: boom"),
        ({"unheard": "of"}, "of unknown state"),
    ],
)
def test_state_of_a_run_is_described(make_run, status, expected):
    (run,) = read_runs([make_run("one", {0: score_of(0.1)}, status=status)])
    assert run.state == expected


def test_every_folder_without_a_run_is_named(make_run, tmp_path):
    complete = make_run("fine", {0: score_of(0.1)})
    empty = make_run("empty", {}, status={"state": "failed", "step": 0, "reason": "no disk"})
    torn = make_run("torn", {0: score_of(0.1)})
    (torn / "metrics.jsonl").write_text('{"no": "step", "eval/score": 1}\n')
    with pytest.raises(UnreadableInput) as caught:
        read_runs([complete, tmp_path / "nowhere", empty, torn])
    nowhere, nothing, broken = caught.value.message.splitlines()
    assert nowhere == f"{tmp_path / 'nowhere'} is not a run directory: it has no resolved.yaml"
    assert "no evaluation to compare (failed after step 0: no disk)" in nothing
    assert "torn" in broken
    with pytest.raises(UnreadableInput, match="named twice"):
        read_runs([complete, tmp_path / "." / "fine"])


def test_runs_of_the_same_name_are_named_by_path(make_run):
    a, b = make_run("a/run", {0: score_of(0.1)}), make_run("b/run", {0: score_of(0.1)})
    assert [run.name for run in read_runs([a, b])] == [str(a), str(b)]


def test_common_budget_of_equal_runs_is_the_end(make_run):
    every = dict.fromkeys((0, 5, 10), score_of(0.5))
    assert common_steps(make_run("a", every), make_run("b", every)) == (10, 10)


def test_largest_common_budget(make_run):
    """100 tokens per step against 50: ten steps of the first equal twenty of the second, which stopped after ten."""
    a = make_run("a", dict.fromkeys((0, 5, 10), score_of(0.5)))
    b = make_run("b", dict.fromkeys((0, 2, 10), score_of(0.5)), tokens=50)
    assert common_steps(a, b) == (5, 10)
    assert common_steps(b, a) == (10, 5)
    assert common_steps(a, b, "steps") == (10, 10)
    assert common_steps(a, b, "time") == (10, 10)


def test_budgets_within_a_tenth_are_equal(make_run):
    a = make_run("a", dict.fromkeys((0, 10), score_of(0.5)))
    near = make_run("near", dict.fromkeys((0, 10), score_of(0.5)), tokens=109)
    far = make_run("far", dict.fromkeys((0, 10), score_of(0.5)), tokens=120)
    assert common_steps(a, near) == (10, 10)
    assert common_steps(a, far) is None


def test_untrained_models_have_no_common_budget(make_run):
    a, b = (make_run(name, {0: score_of(0.5)}) for name in "ab")
    assert common_steps(a, b) is None


def test_sixty_right_is_significantly_above_thirty(make_run):
    a = make_run("a", {0: score_of(0.1), 2: score_of(0.3)})
    b = make_run("b", {0: score_of(0.1), 2: score_of(0.6)})
    (difference,) = compared_scores(a, b)
    assert difference.significant
    assert difference.paired
    assert difference.sizes == (100, 100)
    assert difference.interval.mean == pytest.approx(-0.3)
    half_width = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert difference.interval.low == pytest.approx(-0.3 - half_width, abs=0.011)
    assert difference.interval.high == pytest.approx(-0.3 + half_width, abs=0.011)
    low, high = -difference.interval.high, -difference.interval.low
    assert difference.verdict() == f"b is above a by 0.300 [{low:.3f}, {high:.3f}]"
    (reversed_difference,) = compared_scores(b, a)
    assert reversed_difference.verdict().startswith("b is above a by 0.300 [")


def test_three_more_of_a_hundred_is_noise(make_run):
    """13 gained, 10 lost: a difference of 0.03 with a standard error of 0.048."""
    a = make_run("a", {1: right(*range(30))})
    b = make_run("b", {1: right(*range(10, 43))})
    (difference,) = compared_scores(b, a)
    assert difference.interval.mean == pytest.approx(0.03)
    assert difference.interval.low < 0 < difference.interval.high
    assert difference.verdict() == "no significant difference"


def test_paired_difference_is_more_sensitive(make_run):
    """30 against 42: the same 30 and 12 more.  With other prompts this is noise (standard error 0.067)."""
    a = make_run("a", {1: right(*range(30))})
    b = make_run("b", {1: right(*range(42))})
    (difference,) = compared_scores(b, a)
    assert difference.significant
    other = make_run("c", {1: {f"other {k}": v for k, v in right(*range(42)).items()}})
    (difference,) = compared_scores(other, a)
    assert (difference.paired, difference.significant) == (False, False)
    assert difference.interval.mean == pytest.approx(0.12)
    assert difference.interval.low == pytest.approx(0.12 - 1.96 * 0.0672, abs=0.015)


def test_four_prompts_are_too_few(make_run):
    """Four of four gained: the interval excludes 0, but the permutation test has p = 1/8."""
    a, b = (make_run("a", {1: score_of(0.0, of=4)}), make_run("b", {1: score_of(1.0, of=4)}))
    (difference,) = compared_scores(b, a)
    assert 0 < difference.interval.low < 0.1
    assert difference.interval.high == 1
    assert not difference.significant


def test_more_comparisons_need_a_smaller_p_value(make_run):
    """Six gained of a hundred, none lost: p = 2/64 is below 0.05, but not below 0.05 / 2."""
    sampled = ("sums", "drawn", "right")
    a = make_run("a", {1: {GREEDY: right(), sampled: right()}})
    b = make_run("b", {1: {GREEDY: right(*range(6)), sampled: right()}})
    first, second = compared_scores(b, a)
    assert not first.significant
    assert not second.significant
    (single,) = compared_scores(b, a, score="sums/greedy/right")
    assert single.significant
    assert single.interval.low > first.interval.low
    with pytest.raises(UnreadableInput, match="no run has a score 'wrong'; there are right"):
        compared_scores(a, b, score="wrong")


def test_pass_at_k_is_compared_only_if_asked(make_run):
    pass_at = (*GREEDY[:2], "pass_at_4")
    runs = read_runs([make_run("one", {0: {GREEDY: right(1, of=4), pass_at: right(1, 2, of=4)}})])
    assert score_keys(runs, None) == [GREEDY]
    assert score_keys(runs, "pass_at_4") == [pass_at]


def test_p_values_by_hand():
    """Two of two: ++, −−, +−, −+ are equally likely, and half of them are as far from 0."""
    assert paired_p_value([0, 0], [1, 1]) == pytest.approx(0.5, abs=0.02)
    assert paired_p_value([0, 1], [0, 1]) == 1
    # Of the six ways to choose two of four, one puts both ones right, and one puts both left.
    assert unpaired_p_value([0, 0], [1, 1]) == pytest.approx(1 / 3, abs=0.02)


def test_unpaired_difference_includes_both_variances():
    difference = unpaired_difference(list(score_of(0.2).values()), list(score_of(0.5, of=50).values()))
    assert (difference.mean, difference.n) == (pytest.approx(0.3), 50)
    half_width = 1.96 * (0.2 * 0.8 / 100 + 0.5 * 0.5 / 50) ** 0.5
    assert difference.low == pytest.approx(0.3 - half_width, abs=0.02)
    assert difference.high == pytest.approx(0.3 + half_width, abs=0.02)


def spec_with(*path, to):
    spec = json.loads(json.dumps(SPEC))
    part = spec
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = to
    return spec


def test_differing_settings_are_listed(make_run):
    scores = {0: score_of(0.1)}
    a = make_run("a", scores)
    b = make_run("b", scores, spec=spec_with("training", "seed", to=1))
    c = make_run("c", scores, spec=spec_with("output", "folder", to="elsewhere"))
    d = make_run("d", scores, spec=spec_with("losses", "distil", "coefficient", to=True))
    assert differing_settings(read_runs([a, c])) == []
    assert differing_settings(read_runs([a, b, c])) == [("training", "seed")]
    assert differing_settings(read_runs([a, d])) == [("losses", "distil", "coefficient")]


def test_differing_evaluation_settings_are_listed(make_run):
    temperature = ("evaluation", "suites", "sums", "decoding", "greedy", "temperature")
    paths = [temperature, ("rewards", "right", "kind"), ("rewards", "unused", "kind"), ("training", "seed")]
    assert differing_evaluation(paths, [GREEDY]) == paths[:2]


def compare_output(folders, *options):
    console = Console(file=StringIO(), width=140)
    target = folders[0].parent / "picture.png"
    compare(folders, console, target, *(options or ("tokens", None)))
    assert target.read_bytes()[:4] == b"\x89PNG"
    return console.file.getvalue()


def test_compare_command(sdkit, make_run, tmp_path):
    a = make_run("small", {0: score_of(0.1), 2: score_of(0.3)})
    b = make_run("large", {0: score_of(0.1), 2: score_of(0.6)}, spec=spec_with("training", "seed", to=7))
    picture = tmp_path / "both.png"
    code, out, err = sdkit("compare", a, b, "--to", picture)
    assert (code, err) == (0, "")
    assert "0.300 [0.219, 0.396]" in out  # Wilson's interval of 30 in 100
    assert "95 % intervals over prompts: Wilson's score interval, Tango's score interval" in out
    assert "Bonferroni over 1, Tango's score interval" in out
    assert "too few" not in out
    assert "large is above small by 0.300" in out
    assert "training.seed" in out
    assert "after 200 and 200 generated tokens (steps 2 and 2)" in out
    assert "Bonferroni over 1" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["nowhere", "broken"])
def test_folder_without_a_run_exits_with_2(sdkit, make_run, tmp_path, name):
    (make_run("broken", {0: score_of(0.1)}) / "metrics.jsonl").write_text("no json\n{}\n")
    code, _, err = sdkit("compare", tmp_path / name, "--to", tmp_path / "x.png")
    assert code == 2
    assert name in err
    assert "Traceback" not in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("target", ["picture.txt", "no/such/folder/x.png"])
def test_picture_that_cannot_be_written_exits_with_2(sdkit, make_run, tmp_path, target):
    code, _, err = sdkit("compare", make_run("a", {0: score_of(0.1)}), "--to", tmp_path / target)
    assert code == 2
    assert "picture" in err or "folder" in err


def test_compare_loads_no_torch(make_run, tmp_path):
    folder = make_run("a", {0: score_of(0.1), 1: score_of(0.2)})
    code = (
        "import sys; from sdkit.cli import main\n"
        f"sys.argv = ['sdkit', 'compare', {str(folder)!r}, '--to', {str(tmp_path / 'x.png')!r}]\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_single_run_is_shown(make_run):
    output = compare_output([make_run("one", {0: score_of(0.1), 2: score_of(0.4)})])
    assert "0.100 [" in output
    assert "+0.300" in output
    assert "what differs" not in output
    assert "Bonferroni" not in output


def test_three_runs_are_compared_pairwise(make_run):
    folders = [make_run(f"seed{i}", {2: score_of(0.5)}, spec=spec_with("training", "seed", to=i)) for i in range(3)]
    output = compare_output(folders)
    assert output.count("no significant difference") == 3
    assert "Bonferroni over 3" in output
    assert "is above" not in output


def test_runs_without_a_common_budget_get_no_verdict(make_run):
    a = make_run("a", {0: score_of(0.1), 1: score_of(0.1)})
    b = make_run("b", {0: score_of(0.1), 9: score_of(0.9)})
    output = compare_output([a, b])
    assert "a and b: no verdict, no two evaluations within 10% of each other" in output
    assert "(a after 0, 100; b after 0, 900)" in " ".join(output.split())
    assert "above" not in output


def test_compare_names_longer_runs_and_different_prompts(make_run):
    a = make_run("a", {1: score_of(0.5), 4: score_of(0.9)})
    b = make_run("b", {1: score_of(0.5, of=50)}, status={"state": "stopped", "step": 1})
    output = compare_output([a, b])
    assert "after 100 (of 400) and 100 generated tokens (steps 1 and 1)" in output
    assert "100 and 50, not the same" in output
    assert "Newcombe's hybrid interval" in " ".join(output.split())
    assert "stopped after step 1" in output


def test_compare_warns_of_different_decoding(make_run):
    other_spec = spec_with("evaluation", "suites", "sums", "decoding", "greedy", "temperature", to=1.0)
    a, b = make_run("a", {1: score_of(0.5)}), make_run("b", {1: score_of(0.5)}, spec=other_spec)
    output = compare_output([a, b])
    assert "evaluations differ (evaluation.suites.sums.decoding.greedy.temperature)" in output


def test_different_versions_and_data_are_shown(make_run):
    a = make_run("a", {1: score_of(0.5)}, versions={"torch": "2.1", "vllm": "0.9"})
    b = make_run("b", {1: score_of(0.5)}, versions={"torch": "2.2", "vllm": "0.9"})
    output = compare_output([a, b])
    assert "versions.torch" in output
    assert "versions.vllm" not in output
    assert "the specs are the same" in output


def test_different_code_and_models_are_shown(make_run):
    """Runs of an older sdkit have no hashes, as `c` has none."""
    models = {"student/model.safetensors": "7" * 64}
    a = make_run("a", {1: score_of(0.5)}, code={"score.py": "1" * 64, "same.py": "3" * 64}, models=models)
    b = make_run("b", {1: score_of(0.5)}, code={"score.py": "2" * 64, "same.py": "3" * 64}, models={})
    output = compare_output([a, b])
    assert "code.score.py" in output
    assert "code.same.py" not in output
    assert "models.student/model.safetensors" in output
    assert "the runs' code differs; each run's copy is in its code/" in output
    assert "may not be comparable" not in output  # its only score is an exact match
    assert "code.same.py" in compare_output([a, make_run("c", {1: score_of(0.5)})])


def test_changes_during_a_run_are_shown(make_run):
    change = {"step": 7, "at": "2026-11-28T16:06:43+00:00", "code": {"score.py": "1" * 64}}
    a = make_run("a", {1: score_of(0.5)}, code={"score.py": "2" * 64}, accepted_changes=[change])
    b = make_run("b", {1: score_of(0.5)}, code={"score.py": "2" * 64})
    output = compare_output([a, b])
    assert "accepted_changes.score.py" in output
    assert "after step 7" in output
    assert "code.score.py" not in output
    assert "the runs' code differs" in output


def test_different_code_of_a_reward_is_warned_about(make_run):
    spec = SPEC | {"rewards": {"right": {"kind": "file", "file": "score.py"}}}
    a = make_run("a", {1: score_of(0.5)}, spec=spec, code={"score.py": "1" * 64})
    b = make_run("b", {1: score_of(0.5)}, spec=spec, code={"score.py": "2" * 64})
    assert "the runs' evaluations differ (code.score.py)" in compare_output([a, b])


def test_picture_of_many_runs(make_run):
    """More runs than colors, two decodings."""
    sampled = ("sums", "drawn", "right")
    folders = [
        make_run(f"run{i}", {s: {GREEDY: score_of(0.1 * s, of=9), sampled: right(of=9)} for s in (0, 2)})
        for i in range(9)
    ]
    assert "Bonferroni over 72" in compare_output(folders)


def test_picture_has_the_main_score_of_every_suite(make_run, tmp_path, monkeypatch):
    keys = [(suite, "greedy", reward) for suite in ("sums", "words") for reward in ("right", "form")]
    suites = {suite: {"score": "right"} for suite in ("sums", "words")}
    folder = make_run("one", {0: dict.fromkeys(keys, right(of=4))}, spec=SPEC | {"evaluation": {"suites": suites}})
    drawn = []
    monkeypatch.setattr("sdkit.runs.compare_text.plot_runs", lambda _, keys, *rest: drawn.append(keys))
    for score in (None, "form"):
        compare([folder], Console(file=StringIO()), tmp_path / "picture.png", "tokens", score)
    assert drawn == [[keys[0], keys[2]], [keys[1], keys[3]]]


def test_brackets_in_names_are_no_markup(make_run):
    a, b = make_run("a[bold]", {1: score_of(0.1)}), make_run("b[x]", {1: score_of(0.9)})
    assert "b[x] is above a[bold] by 0.800" in compare_output([a, b])
