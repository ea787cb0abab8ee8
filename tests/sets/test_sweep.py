"""`--seeds` and `sdkit sweep`: the grid, its problems, the choice of the best point, and the commands."""

import json
import shlex
from io import StringIO

import pytest
import yaml
from attrs import evolve
from rich.console import Console
from run_directories import SPEC, right, write_run
from tinyruns import make_spec, with_evaluation

from sdkit.language.errors import UnreadableInput
from sdkit.language.resolved import resolved
from sdkit.language.specs import Table
from sdkit.report.records import read_contents
from sdkit.runs.run_sets import Member, RunSet, read_set, write_set
from sdkit.sets.grid import GridKey, make_points, parse_key, split_values
from sdkit.sets.seeds import parse_seeds
from sdkit.sets.sweep import Choice, choose_suites, report_sweep, same_prompts_warning


@pytest.fixture
def spec(tiny_folder):
    """A run file without suites of their own names, two suites, two steps."""
    return with_evaluation(make_spec(tiny_folder))


@pytest.fixture
def run_file(spec, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(resolved(spec), sort_keys=False))
    return path


def test_values_are_split_at_outer_commas():
    assert split_values("1e-5, 3e-5") == ["1e-5", "3e-5"]
    assert split_values("[0.9,0.95],[0.9,0.99]") == ["[0.9,0.95]", "[0.9,0.99]"]
    assert split_values("forward_kl,{kind: jsd, teacher_share: 0.3},'a,b'") == [
        "forward_kl",
        "{kind: jsd, teacher_share: 0.3}",
        "'a,b'",
    ]


def test_points_are_all_combinations_under_short_names():
    keys = [parse_key("optimizer.lr=1e-5,3e-5"), parse_key("losses.distil.divergence=jsd,{kind: jsd}")]
    assert [point.name for point in make_points(keys)] == [
        "lr=1e-5,divergence=jsd",
        "lr=1e-5,divergence=kind_jsd",
        "lr=3e-5,divergence=jsd",
        "lr=3e-5,divergence=kind_jsd",
    ]
    assert make_points(keys)[1].overrides == ("optimizer.lr=1e-5", "losses.distil.divergence={kind: jsd}")


def test_names_stay_different():
    same_ends = [GridKey("a.lr", ("1",)), GridKey("b.lr", ("1",))]
    assert make_points(same_ends)[0].name == "a.lr=1,b.lr=1"
    assert [p.name for p in make_points([GridKey("k", ("[1]", "{1}"))])] == ["k=1", "k=1-2"]


@pytest.mark.parametrize("text", ["optimizer.lr", "optimizer.lr=", "=1,2", "optimizer.lr=1,,2"])
def test_malformed_grid_is_refused(text):
    with pytest.raises(UnreadableInput, match="not of the form KEY=VALUE,VALUE"):
        parse_key(text)


def test_grid_names_nothing_twice():
    with pytest.raises(UnreadableInput, match="1e-5 is named twice"):
        parse_key("optimizer.lr=1e-5,1e-5")
    with pytest.raises(UnreadableInput, match=r"--over optimizer\.lr is given twice"):
        make_points([GridKey("optimizer.lr", ("1",)), GridKey("optimizer.lr", ("2",))])


def test_seeds_are_parsed():
    assert parse_seeds("0, 1,2") == (0, 1, 2)
    for text, fault in (
        ("0,x", "'x' is not a whole number"),
        ("-1", "'-1'"),
        ("4294967296", "whole"),
        ("1,1", "twice"),
    ):
        with pytest.raises(UnreadableInput, match=fault):
            parse_seeds(text)


def suites(spec, *names):
    """The evaluation with suites of these names; each has other prompts."""
    source = next(iter(spec.suites.values()))
    return evolve(spec, evaluation=evolve(spec.evaluation, suites=Table(dict.fromkeys(names, source))))


def test_suites_are_chosen_by_name_or_place(spec):
    assert choose_suites(spec, None, None) == Choice(chooses="sums", reports="more")
    named = suites(spec, "test", "other", "validation")
    assert choose_suites(named, None, None) == Choice(chooses="validation", reports="test")
    assert choose_suites(suites(spec, "test", "other"), None, None) == Choice(chooses="other", reports="test")
    assert choose_suites(named, "other", "validation") == Choice(chooses="other", reports="validation")
    with pytest.raises(UnreadableInput, match="--choose othr: there is no suite") as caught:
        choose_suites(named, "othr", None)
    assert caught.value.hint == 'did you mean "other"?'
    with pytest.raises(UnreadableInput, match="no evaluation"):
        choose_suites(evolve(spec, evaluation=None), None, None)


def test_choosing_and_reporting_on_the_same_prompts_is_warned_about(spec):
    one, same = Choice(chooses="sums", reports="sums"), Choice(chooses="a", reports="b")
    assert "suite sums chooses the best point and reports its score" in same_prompts_warning(one, spec.suites)
    assert "suites a and b have the same data" in same_prompts_warning(same, suites(spec, "a", "b").suites)
    assert same_prompts_warning(choose_suites(spec, None, None), spec.suites) is None


def test_all_problems_of_all_points_are_reported_before_anything_runs(sdkit, run_file, tmp_path):
    command = ["sweep", run_file, "training.steps=2", "--to", tmp_path / "sweep"]
    code, _, err = sdkit(*command, "--over", "optimizer.lrr=1,2", "--over", "training.micro_batch_tokens=64,-1")
    assert code == 1
    assert "<command line>:2:1: unknown key 'lrr'" in err
    assert err.count("unknown key") == 1
    assert "2 | optimizer.lrr=1\n  | ^^^^^^^^^^^^^" in err
    assert "'micro_batch_tokens' is -1" in err
    assert "in 2 points: 'lrr=1,micro_batch_tokens=-1', 'lrr=2,micro_batch_tokens=-1'" in err
    assert not (tmp_path / "sweep").exists()


def test_grid_may_give_a_key_that_the_run_file_lacks(sdkit, run_file):
    data = yaml.safe_load(run_file.read_text())
    del data["optimizer"]
    run_file.write_text(yaml.safe_dump(data))
    assert sdkit("sweep", run_file, "--over", "optimizer.lr=1e-5", "--dry-run")[0] == 0
    assert "is a method page" in sdkit("sweep", "sdft", "--over", "rollout.max_new_tokens=8,16", "--dry-run")[2]


def test_dry_run_plans_every_point(sdkit, run_file, tmp_path):
    command = ["sweep", run_file, "--over", "optimizer.lr=1e-5,3e-5", "--seeds", "0,1", "--to", tmp_path / "sweep"]
    code, out, _ = sdkit(*command, "--dry-run")
    assert code == 0
    assert "sweep: 2 points × 2 seeds = 4 runs, time unknown" in out
    assert "lr=1e-5: 3 steps" in out
    assert "chosen by suite sums, reported on suite more" in out
    assert not (tmp_path / "sweep").exists()


def test_commands_of_a_job_array(sdkit, run_file, tmp_path):
    folder = tmp_path / "sweep"
    command = ["sweep", run_file, "--over", "optimizer.lr=1e-5,3e-5", "--seeds", "0,1", "--to", folder]
    _, out, err = sdkit(*command, "--print-commands")
    lines = [shlex.split(line) for line in out.splitlines() if line.startswith("sdkit ")]
    assert [line[3] for line in lines] == ["optimizer.lr=1e-5", "optimizer.lr=3e-5"]
    assert lines[0][4:] == ["--to", str(folder / "lr=1e-5"), "--seeds", "0,1"]
    assert "--resume prints the table" in err
    assert read_set(folder).kind == "sweep"
    assert sdkit(*command, "--print-commands")[1] == out
    code, _, err = sdkit(*command, "optimizer.weight_decay=0.1", "--print-commands")
    assert (code, "optimizer.weight_decay: 0.0 then, 0.1 now" in err) == (2, True)


def points_of(folder, chosen, reported):
    """A sweep whose points have these shares of right answers in the suites `validation` and `test`."""
    spec = json.loads(json.dumps(SPEC))
    spec["evaluation"]["suites"] = dict.fromkeys(("validation", "test"), SPEC["evaluation"]["suites"]["sums"])
    members = tuple(Member(name=f"lr={i}", spec="spec.yaml", settings={}) for i in range(len(chosen)))
    run_set = RunSet(path=folder, kind="sweep", members=members)
    write_set(run_set)
    for i, shares in enumerate(zip(chosen, reported, strict=True)):
        scores = {
            (suite, "greedy", "right"): {f"{suite} {k}": v for k, v in right(*range(share)).items()}
            for suite, share in zip(("validation", "test"), shares, strict=True)
        }
        write_run(folder / f"lr={i}", {0: scores, 2: scores}, spec=spec)
    return run_set


def test_best_point_is_chosen_on_one_suite_and_reported_on_the_other(tmp_path, spec):
    run_set = points_of(tmp_path / "sweep", chosen=(20, 60, 58), reported=(90, 40, 50))
    console = Console(file=StringIO(), width=200)
    choice = Choice(chooses="validation", reports="test")
    report_sweep(run_set, choice, evolve_suites(spec), console)
    text = console.file.getvalue()
    assert "best by validation/greedy/right: lr=1; on test/greedy/right it has 0.400 [" in text
    assert "not significantly worse (95 %, Bonferroni over 2): lr=2" in text
    assert "warning" not in text
    assert (run_set.path / "sweep.png").is_file()
    written = json.loads((run_set.path / "sweep.json").read_text())
    assert (written["best"], written["reports"]) == ("lr=1", "test/greedy/right")
    assert written["verdict"].startswith("best by validation/greedy/right: lr=1; on test")
    (state,) = read_contents([run_set.path]).sets
    assert state.verdict == written["verdict"]


def evolve_suites(spec):
    first, second = spec.suites.values()
    return Table({"validation": first, "test": second})


def test_seeds_in_two_places_are_refused_at_the_word(sdkit, run_file):
    code, _, err = sdkit("train", run_file, "training.steps=2", "training.seed=4", "--seeds", "0,1")
    assert code == 1
    assert "<command line>:2:1: training.seed is given here and by --seeds [override]" in err
    code, _, err = sdkit("sweep", run_file, "--over", "training.seed=1,2", "--seeds", "0,1", "--dry-run")
    assert (code, "<command line>:1:1: training.seed is given here and by --seeds" in err) == (1, True)
    code, _, err = sdkit("train", run_file, "--parallel", "2")
    assert (code, "--parallel needs --seeds" in err) == (2, True)


def test_plan_shows_the_seeds(sdkit, run_file):
    _, out, _ = sdkit("plan", run_file, "--seeds", "0,1,2")
    assert out.endswith("seeds:\n  3 runs: training.seed 0, 1, 2, each in seed_N of the run directory\n")


def test_evaluation_of_unfinished_seeds_is_refused_before_it_starts(sdkit, tmp_path):
    members = (Member(name="seed_0", spec="spec.yaml", settings={}),)
    write_set(RunSet(path=tmp_path / "ours", kind="seeds", members=members))
    code, _, err = sdkit("eval", tmp_path / "ours")
    assert (code, "has no model/ yet" in err) == (2, True)


@pytest.mark.full
def test_seeds_and_sweeps_train_evaluate_and_resume(warm, run_file, tmp_path):
    """The whole path, with real processes: train two seeds, compare, evaluate; sweep two points and resume."""

    def run(*command):
        done = warm.run("-m", "sdkit", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    out = run("train", run_file, "--seeds", "0,1", "--to", "seeds")
    assert "2 seeds done" in out
    assert (tmp_path / "seeds" / "scores.png").is_file()
    assert "2 of 2 runs are finished already" in run("train", run_file, "--seeds", "0,1", "--to", "seeds", "--resume")
    facts = json.loads(run("eval", "seeds", "--format", "json", "--to", "measured"))
    assert facts["seeds"] == [0, 1]
    measured = {(each["suite"], each["decoding"], each["score"]) for each in facts["scores"]}
    assert {("sums", "greedy", "right"), ("sums", "drawn", "pass_at_2")} < measured
    assert len(measured) == len(facts["scores"])
    out = run("sweep", run_file, "--over", "optimizer.lr=1e-3,1e-4", "--to", "sweep", "--parallel", "2")
    assert "best by sums/greedy/right" in out
