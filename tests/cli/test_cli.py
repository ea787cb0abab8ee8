"""The command line: output and exit code of each command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdkit import __version__
from sdkit.language.errors import COMMAND_LINE, EXIT_CODES
from sdkit.language.load import load_spec
from sdkit.language.resolved import resolved
from sdkit.language.sequences import is_sequence

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "specs"
DEMO = SPECS / "sdft.yaml"
PAGES = ROOT / "sdkit" / "methods"
METHOD = PAGES / "sdft.yaml"
COMMANDS = (
    "validate",
    "show",
    "plan",
    "smoke",
    "train",
    "eval",
    "replay",
    "rollouts",
    "compare",
    "diff",
    "export",
    "checkpoint",
    "explain",
    "methods",
    "new",
    "import",
    "fmt",
    "schema",
    "doctor",
)
RUN = """
model: {path: MODEL, dtype: float32}
data:
  source: {kind: inline, rows: [{q: 1 + 1, d: "1 + 1 = 2"}, {q: 2 + 2, d: "2 + 2 = 4"}, {q: 3 + 3, d: "3 + 3 = 6"}]}
  columns: {prompt: q, demonstration: d}
rollout: {max_new_tokens: 8, backend: transformers}
teacher:
  weights: frozen
  sees: {template: "{prompt} ({demonstration})", slots: {demonstration: {kind: column, name: demonstration}}}
losses:
  distil: {kind: distillation, divergence: forward_kl, support: vocabulary}
rewards:
  digit: {kind: regex, pattern: '\\d'}
evaluation:
  suites:
    held_out: {data: {source: {kind: inline, rows: [{q: 7 + 7, d: "7 + 7 = 14"}]}}, score: digit}
optimizer: {lr: 1.0e-3}
training: {steps: 1, prompts_per_step: 2}
output: {trackers: []}
"""


def process(*args, cwd=None):
    """Runs a command line in a process of its own."""
    command = [sys.executable, "-m", "sdkit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture
def run_file(tiny_folder, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RUN.replace("MODEL", str(tiny_folder)))
    return path


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(RUN.replace("forward_kl", "forwards_kl").replace("steps: 1", "steps: 0"))
    return path


def test_version(sdkit):
    assert sdkit("--version") == (0, f"sdkit {__version__}\n", "")


def test_help_lists_every_command_and_the_exit_codes(sdkit):
    code, out, _ = sdkit("--help")
    assert code == 0
    words = " ".join(out.split())
    for text in (*COMMANDS, *(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())):
        assert text.replace("`", "") in words


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example(sdkit, command):
    code, out, _ = sdkit(command, "--help")
    assert code == 0
    assert f"sdkit {command}" in out.split("Example", 1)[1]


def test_examples_of_the_help_texts_name_files_that_exist():
    import re

    text = "".join(path.read_text() for path in (ROOT / "sdkit" / "cli").glob("*.py"))
    named = set(re.findall(r"specs/[\w/]+\.yaml", text))
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(("path", "code"), [(DEMO, 0), (ROOT / "tests/err/seven.yaml", 1), ("nowhere.yaml", 2)])
def test_process_has_the_exit_code(path, code):
    done = process("validate", path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_explain_and_schema_print_to_standard_output(sdkit):
    code, out, err = sdkit("explain", "optimizer.lr")
    assert (code, out.splitlines()[:2], err) == (0, ["optimizer.lr", "  peak learning rate"], "")
    assert "A run file has these keys" in sdkit("explain")[1]
    code, out, err = sdkit("schema")
    assert (code, json.loads(out)["type"], err) == (0, "object", "")


def test_methods_are_listed_and_searched(sdkit):
    code, out, err = sdkit("methods")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 1 + len(list(PAGES.glob("*.yaml"))))
    code, out, _ = sdkit("methods", "SIBLING", "2601.20802", "feedback")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["sdpo", "2601.20802", "a"],
        ["sdpo_rich_feedback", "2601.20802", "a"],
    ]
    code, out, err = sdkit("methods", "sdfs")
    assert (code, out) == (2, "")
    assert err == "error: no packaged method has 'sdfs' in its page\n  = did you mean \"sdft\"?\n"


def test_new_writes_a_run_file_once(sdkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "1 + 1", "worked": "1 + 1 = 2", "answer": "2"}\n' * 3)
    command = ("new", "mine.yaml", "--method", "sdft", "--data", "rows.jsonl", "--column", "demonstration=worked")
    code, out, err = sdkit(*command)
    assert (code, out, err) == (0, "mine.yaml: written; `sdkit plan mine.yaml` shows what it would do\n", "")
    assert sdkit("validate", "mine.yaml", "--strict")[0] == 0
    text = Path("mine.yaml").read_text()
    code, _, err = sdkit(*command)
    assert (code, "mine.yaml exists" in err, Path("mine.yaml").read_text()) == (2, True, text)


def test_new_leaves_no_file_that_has_errors(sdkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    code, out, err = sdkit("new", "a.yaml", "--method", "grpo", "--data", "rows.jsonl", "--reward", "no.py:f")
    assert (code, out, Path("a.yaml").exists()) == (1, "", False)
    assert "no.py" in err
    assert sdkit("new", "a.yaml", "--method", "sft")[0] == 2  # no terminal to ask for the data


def test_fmt_checks_and_formats(sdkit, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optimizer: {lr: 1e-5} # the rate\nmethod: sft\n")
    path.chmod(0o600)
    assert sdkit("fmt", "--check", path) == (1, f"{path}: would change\n", "")
    assert sdkit("fmt", path) == (0, f"{path}: formatted\n", "")
    assert path.read_text() == "method: sft\noptimizer: {lr: 1.0e-5} # the rate\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sdkit("fmt", "--check", path) == (0, "", "")
    path.write_text("a: [")
    code, out, err = sdkit("fmt", path)
    assert (code, out, path.read_text()) == (1, "", "a: [")
    assert err.startswith(f"{path}:1:")
    assert sdkit("fmt", "sft")[0] == 2  # a packaged page is no file of the user's


def test_import_writes_a_formatted_run_file_and_a_list(sdkit, tmp_path):
    config, target = tmp_path / "config.yaml", tmp_path / "run.yaml"
    config.write_text("lmbda: 0.5\nmodel_name_or_path: org/model\npacking: true\n")
    code, out, _ = sdkit("import", config, "--to", target, "learning_rate=3e-4")
    assert (code, out.splitlines()[:3]) == (
        0,
        [
            f"{target}: written, from TRL's GKDConfig",
            "no equivalent:",
            "  packing: true – rows are packed by training.micro_batch_tokens",
        ],
    )
    assert target.read_text().startswith("# From config.yaml, TRL's GKDConfig.")
    assert "  lr: 0.0003 # learning_rate\n" in target.read_text()
    assert sdkit("fmt", "--check", target)[0] == 0
    assert sdkit("import", config, "--to", target)[0] == 2  # the file exists


def test_validate_reports_specs_without_problems(sdkit):
    assert sdkit("validate", DEMO, METHOD) == (0, f"{DEMO}: ok (run file)\n{METHOD}: ok (method page)\n", "")


def test_validate_takes_overrides(sdkit):
    assert sdkit("validate", DEMO, "rollout.temperature=0.5", METHOD)[0] == 0
    code, _, err = sdkit("validate", DEMO, "training.steps=none")
    assert code == 1
    assert "<command line>:1:16: 'none' is text, not null" in err
    assert sdkit("validate", "training.steps=3")[0] == 2


def test_validate_with_data_shows_prompts(sdkit, run_file):
    code, out, err = sdkit("validate", run_file, "training.steps=2", "--data", "1")
    assert code == 0, err
    assert f"{run_file}: ok (run file)" in out
    assert "completion goes here" in out
    assert "longest prompt and completion" in out
    assert sdkit("validate", METHOD, "--data", "1")[0] == 2


def test_validate_shows_every_problem_of_every_file(sdkit, broken):
    code, out, err = sdkit("validate", DEMO, broken)
    assert code == 1
    assert f"{DEMO}: ok" in out
    assert f"{broken}:11:" in err
    assert "'forwards_kl' is not one of" in err
    assert 'did you mean "forward_kl"?' in err
    assert "steps" in err


def test_validate_prints_json(sdkit, broken):
    code, out, err = sdkit("validate", DEMO, broken, broken, "--format", "json")
    problems = json.loads(out)
    assert (code, err) == (1, "")
    assert [p["line"] for p in problems] == [11, 18]
    assert {p["file"] for p in problems} == {str(broken)}
    code, out, _ = sdkit("validate", DEMO, "--format", "json")
    assert (code, json.loads(out)) == (0, [])


def test_validate_prints_github_annotations(sdkit, broken):
    code, out, _ = sdkit("validate", broken, "--format", "github")
    assert code == 1
    assert all(line.startswith(f"::error file={broken},line=") for line in out.splitlines())


def test_validate_prints_sarif(sdkit, broken):
    code, out, err = sdkit("validate", broken, "--format", "sarif")
    results = json.loads(out)["runs"][0]["results"]
    assert (code, err, [result["level"] for result in results]) == (1, "", ["error", "error"])


def test_strict_validation_counts_warnings_as_errors(sdkit, tmp_path):
    run_file = tmp_path / "warned.yaml"
    text = RUN.replace("MODEL", "bundled:smollm2-135m-instruct")
    run_file.write_text(text.replace("trackers: []", "keep_checkpoints: 2"))
    code, out, err = sdkit("validate", run_file)
    assert (code, out) == (0, f"{run_file}: ok (run file)\n")
    assert "warning: " in err
    code, out, strict = sdkit("validate", run_file, "--strict")
    assert (code, out, strict) == (1, "", err.replace("warning: ", ""))
    assert sdkit("validate", DEMO, "--strict")[0] == 0


@pytest.mark.parametrize(
    "args",
    [
        ("validate", DEMO, "--format", "xml"),
        ("validate",),
        ("plan", "nowhere.yaml"),
        ("plan", METHOD, "--data", "1"),
        ("train", METHOD),
        ("train", METHOD, "--dry-run"),
        ("eval", METHOD),
        ("eval", ROOT / "specs"),
        ("train", DEMO, "--resume", "--overwrite"),
        ("train", DEMO, "--changed-code"),
        ("replay", "nowhere@0"),
        ("replay", ROOT / "specs"),
        ("export", ROOT / "specs", "--to", "nowhere"),
        ("export", ROOT / "specs"),
        ("unknown",),
        ("explain", "divergnce"),
    ],
)
def test_wrong_command_line_exits_with_2(sdkit, args):
    code, _, err = sdkit(*args)
    assert code == 2
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["show", "plan", "smoke", "train", "eval"])
def test_spec_with_problems_exits_with_1(sdkit, broken, command):
    code, _, err = sdkit(command, broken)
    assert code == 1
    assert "'forwards_kl' is not one of" in err


@pytest.mark.parametrize("path", [DEMO, METHOD, ROOT / "tests/ok/every_union.yaml"])
def test_show_reads_back_as_the_same_spec(sdkit, tmp_path, path):
    code, out, _ = sdkit("show", path)
    assert code == 0
    assert yaml.safe_load(out) == resolved(load_spec(path).spec)
    (tmp_path / "shown.yaml").write_text(out)
    again = load_spec(tmp_path / "shown.yaml", base=path.parent)
    assert again.spec == load_spec(path).spec


def test_show_names_the_origin_of_each_value(sdkit):
    _, out, _ = sdkit("show", DEMO, "optimizer.lr=1e-6")
    origins = {}
    for line in out.splitlines():
        origins.setdefault(line.split(":")[0].strip(), line.rpartition("# ")[2])
    assert origins["lr"].startswith(COMMAND_LINE)
    assert origins["eps"] == "default"
    assert origins["completions_per_prompt"].startswith(os.path.relpath(METHOD))
    assert origins["max_new_tokens"].startswith(str(DEMO))
    assert yaml.safe_load(out)["optimizer"]["lr"] == 1e-6


def test_wrong_override_is_attributed_to_the_command_line(sdkit):
    code, _, err = sdkit("show", DEMO, "optimizer.learning_rate=1", "training.steps=many")
    assert code == 1
    assert err.count(COMMAND_LINE) >= 2
    assert "training.steps=many" in err


def test_plan_and_show_accept_a_run_directory(sdkit, tmp_path):
    spec = load_spec(DEMO).spec
    (tmp_path / "resolved.yaml").write_text(json.dumps(resolved(spec)))
    (tmp_path / "provenance.json").write_text(json.dumps({"base": str(SPECS)}))
    assert sdkit("plan", tmp_path)[:2] == sdkit("plan", DEMO)[:2]
    code, out, err = sdkit("show", tmp_path, "training.steps=7")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["training"]["steps"] == 7


def test_show_of_another_folder_says_what_is_missing(sdkit, tmp_path):
    code, _, err = sdkit("show", tmp_path)
    assert code == 2
    assert "is not a run directory: it has no resolved.yaml" in err


def test_plan_prints_the_objective(sdkit):
    code, out, _ = sdkit("plan", DEMO, "training.steps=7")
    assert code == 0
    for words in ("objective:", "forward KL(teacher‖student)", "rollout batches: 7", "GiB"):
        assert words in out


@pytest.mark.parametrize("name", ["sdft", "srpo"])
def test_plan_of_a_method_page_matches_the_golden_text(sdkit, name):
    golden = ROOT / "tests" / "plans" / "methods" / f"{name}.txt"
    assert sdkit("plan", PAGES / f"{name}.yaml") == (0, golden.read_text(), "")


def test_plan_of_a_method_page_takes_overrides(sdkit):
    _, out, _ = sdkit("plan", METHOD, "losses.distil.divergence=reverse_kl")
    assert "reverse KL(student‖teacher)" in out


def test_plan_shows_both_prompts_of_a_row(sdkit, run_file):
    code, out, _ = sdkit("plan", run_file, "--data", 2)
    assert code == 0
    assert out.count("completion goes here") == 4
    assert "1 + 1 (1 + 1 = 2)" in out


def test_plan_names_context_known_only_after_sampling(sdkit, run_file):
    sees = "teacher.sees={kind: user_turn, template: '{prompt} {try}', slots: {try: {kind: own_attempt}}}"
    code, out, _ = sdkit("plan", run_file, "--data", 1, sees)
    assert code == 0
    assert "known after sampling (slots: try)" in " ".join(out.split())


SHIPPED = [path for path in sorted([*PAGES.glob("*.yaml"), *SPECS.rglob("*.yaml")]) if not is_sequence(path)]
# The papers' files differ from their pages in data and sizes, which a smoke run replaces.
OF_PAPERS = [pytest.param(path, marks=pytest.mark.full) for path in SHIPPED if "papers" in path.parts]
OTHERS = [path for path in SHIPPED if "papers" not in path.parts]


@pytest.mark.parametrize("path", [*OTHERS, *OF_PAPERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_spec_passes_the_smoke_run(sdkit, path):
    code, out, err = sdkit("smoke", path)
    assert code == 0, err
    assert "step 2/2" in out
    assert "smoke run passed" in out


def test_train_alone_writes_to_standard_output(run_file, tmp_path):
    """From another folder, with a relative run directory; no library prints a warning."""
    done = process("train", run_file, "--to", "here/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, last = [line.partition(" ") for line in done.stdout.splitlines()]
    assert (first[2], last[2]) == ("loading libraries …", "run directory: here/run")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", first[0])
    assert "WARNING" not in done.stdout + done.stderr
    assert (tmp_path / "here" / "run" / "model" / "config.json").is_file()


def test_train_then_eval(sdkit, run_file, tmp_path):
    folder = tmp_path / "runs" / "one"
    code, out, err = sdkit("train", run_file, "training.steps=2", "--to", folder)
    assert code == 0, err
    assert "step 2/2" in out
    assert "run directory:" in out
    assert "# samples of step 1" in (folder / "samples/step_000001.md").read_text()
    written = (folder / "spec.yaml").read_text()
    assert written == run_file.read_text()
    again = load_spec(folder / "resolved.yaml", base=run_file.parent)
    assert again.spec == load_spec(run_file, ["training.steps=2"]).spec
    code, out, err = sdkit("eval", folder, "--to", tmp_path / "measured", "--format", "json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts == json.loads((tmp_path / "measured/evaluation.json").read_text())
    assert {score["suite"] for score in facts["scores"]} == {"held_out"}
    for score in facts["scores"]:
        assert score["low"] <= score["mean"] <= score["high"]
        assert score["method"]
    completions = [json.loads(line) for line in (tmp_path / "measured/completions.jsonl").read_text().splitlines()]
    assert len({record["row"] for record in completions}) == facts["scores"][0]["n"]
    assert completions[0]["completion"] in (tmp_path / "measured/completions.md").read_text()
    assert load_spec(tmp_path / "measured/spec.yaml", base=run_file.parent).spec.model.lora is None
    code, _, err = sdkit("eval", folder, "--to", tmp_path / "measured")
    assert (code, "exists" in err) == (2, True)
    code, out, err = sdkit("compare", folder, "--to", tmp_path / "run.png")
    assert code == 0, err
    assert "digit" in out
    assert (tmp_path / "run.png").is_file()
    code, out, _ = sdkit("eval", run_file)
    assert code == 0
    code, _, err = sdkit("train", run_file, "--to", folder)
    assert code == 2
    assert "--overwrite" in err


def test_run_directory_with_glob_characters_is_refused(sdkit, run_file, tmp_path):
    code, _, err = sdkit("train", run_file, "--to", tmp_path / "runs[1]")
    assert code == 2
    assert "may have none of [ ] * ?" in err
    assert not any(tmp_path.glob("runs*"))


def test_train_then_replay_then_export(sdkit, run_file, tmp_path):
    folder = tmp_path / "run"
    assert sdkit("train", run_file, "training.steps=2", "--to", folder)[0] == 0
    code, out, err = sdkit("replay", f"{folder}@0", "losses.distil.divergence=reverse_kl")
    assert code == 0, err
    assert f"replay: rollout batches 0 to 1 of {folder}" in out
    other = tmp_path / "run-replay"
    assert completions(other) == completions(folder)
    code, out, err = sdkit("compare", folder, other, "--to", tmp_path / "both.png")
    assert code == 0, err
    assert "losses.distil.divergence.kind" in out
    code, _, err = sdkit("replay", f"{folder}@0", "rollout.temperature=0.5", "--to", tmp_path / "x")
    assert code == 2
    assert "rollout.temperature: 1.0 then, 0.5 now (the completions are the recording's)" in err
    code, _, err = sdkit("train", run_file, "training.steps=2", "--to", other, "--resume")
    assert code == 2
    code, out, err = sdkit("export", other, "--to", tmp_path / "model")
    assert code == 0, err
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "rollouts: recorded by the run run, from step 0 on" in (tmp_path / "model" / "README.md").read_text()
    assert sdkit("export", other, "--to", tmp_path / "model")[0] == 2


def completions(folder):
    """Token ids that a run sampled in its first step."""
    records = (folder / "rollouts" / "step_000000.jsonl").read_text().splitlines()
    return [json.loads(record)["completion_ids"] for record in records]


IMITATE = """
losses: {imitate: {kind: cross_entropy}}
rewards: {right: {kind: regex, pattern: '^= 2'}}
optimizer: {lr: 1.0e-2}
training: {steps: 12, prompts_per_step: 3}
"""


def test_eval_of_a_run_uses_its_trained_model(sdkit, run_file, tmp_path):
    """Trained on one answer until the model gives it; the run merges its adapter into the model."""
    spec = yaml.safe_load(run_file.read_text()) | yaml.safe_load(IMITATE)
    del spec["teacher"]
    spec["rollout"] = {"sampled_by": "dataset", "max_new_tokens": 4, "backend": "transformers"}
    spec["evaluation"]["suites"]["held_out"]["score"] = "right"
    spec["model"]["lora"] = {"r": 8, "lora_alpha": 16}
    for row in spec["data"]["source"]["rows"]:
        row["d"] = "= 2"
    run_file.write_text(yaml.safe_dump(spec))
    folder = tmp_path / "run"
    code, _, err = sdkit("train", run_file, "--to", folder)
    assert code == 0, err
    assert "greedy   │ right │ 0.000" in sdkit("eval", run_file)[1]
    assert "greedy   │ right │ 1.000" in sdkit("eval", folder)[1]


def test_run_directory_is_named_after_the_spec(sdkit, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sdkit("train", run_file, "output.folder=elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "small" / "resolved.yaml").is_file()


def test_dry_run_trains_nothing(sdkit, run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = sdkit("train", run_file, "--dry-run")
    assert code == 0
    assert "objective:" in out
    assert "reward digit, training rows: " in out
    assert "smoke run passed" in out
    assert not (tmp_path / "runs").exists()


def test_smoke_says_what_it_did_not_try(sdkit, run_file):
    assert "rows and rewards were stand-ins" in sdkit("smoke", run_file)[1]


GAME = """
class Game:
    def reset(self, **columns):
        pass

    def reply(self, text):
        return "Again.", 0.0
"""


def test_smoke_plays_the_environment_of_a_users_file(sdkit, run_file):
    written = "environment: {kind: file, file: game.py, class_name: Game}\n"
    run_file.write_text(run_file.read_text() + written)
    (run_file.parent / "game.py").write_text(GAME)
    code, out, _ = sdkit("smoke", run_file, "--steps", "1")
    assert code == 0
    assert "environment Game in game.py, up to 3 turns, on rows 0" in out
    assert "played with scripted turns: Game in game.py, up to 3 turns" in out
    assert "rows, rewards and the environment's replies were stand-ins in the steps" in out

    (run_file.parent / "game.py").write_text(GAME.replace("pass", "self.start = columns['begin']"))
    for words in (("smoke", run_file), ("train", run_file, "--dry-run")):
        code, out, err = sdkit(*words)
        assert code == 3
        assert "error: game.py:4:1: row 0: Game.reset in game.py: KeyError: 'begin'" in err
        assert "step 1" not in out


def test_bad_data_exits_with_3(sdkit, run_file, tmp_path):
    code, _, err = sdkit("train", run_file, "rollout.max_prompt_tokens=2", "--to", tmp_path / "x")
    assert code == 3
    assert "more than 2" in err


def test_stopped_run_exits_with_7_and_can_be_resumed(warm, run_file, tmp_path):
    """SIGTERM to a real process; a second process finishes the run."""
    folder = tmp_path / "run"
    args = ["train", str(run_file), "training.steps=400", "--to", str(folder)]
    stopped = subprocess.Popen(
        [sys.executable, "-m", "sdkit", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in stopped.stdout:
        if "step 1/" in line:
            stopped.terminate()
            break
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 7, err
    assert "--resume" in err
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    lines_written = len((folder / "metrics.jsonl").read_text().splitlines())
    steps = f"training.steps={lines_written + 3}"
    done = warm.run("-m", "sdkit", "train", run_file, steps, "--to", folder, "--resume", timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
