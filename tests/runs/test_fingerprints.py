"""Hashes of a run's code and local models: what they cover, when a file is read again, what differs."""

import hashlib
import json
import os
import subprocess

import pytest
from attrs import evolve
from tinyruns import distil, make_spec

from sdkit.language import files
from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import CrossEntropy, FileDivergence, FileReward, FileWeight, RewardModel, Table
from sdkit.runs import fingerprints, git


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def spec(tmp_path):
    """A spec in project/specs with a function of each kind; one file is in another folder."""
    for name, text in {"own.py": "import own_part", "own_part.py": "", "../shared/score.py": "f = 1"}.items():
        path = tmp_path / "project/specs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    losses = {
        **distil(divergence=FileDivergence(file="./own.py", function="f")),
        "more": CrossEntropy(weight=FileWeight(file="own.py", function="f", given=("position",))),
    }
    rewards = {"r": FileReward(file="../shared/score.py", function="f")}
    return make_spec("student", losses=Table(losses), rewards=Table(rewards))


@pytest.fixture
def base(spec, tmp_path):
    return tmp_path / "project/specs"


def test_code_of_every_kind_is_hashed_by_its_path_from_the_spec(spec, base):
    hashes = fingerprints.of_code(spec, base)
    assert hashes == {
        "../shared/score.py": sha256("f = 1"),
        "own.py": sha256("import own_part"),
        "own_part.py": sha256(""),
    }


def test_copies_keep_their_folders(spec, base, tmp_path):
    fingerprints.copy_code(fingerprints.of_code(spec, base), base, tmp_path / "code")
    copies = sorted(str(p.relative_to(tmp_path / "code")) for p in (tmp_path / "code").rglob("*.py"))
    assert copies == ["__/shared/score.py", "own.py", "own_part.py"]
    assert (tmp_path / "code/own.py").read_text() == "import own_part"


def test_file_that_changes_while_a_run_starts_is_an_error(spec, base, tmp_path):
    code = fingerprints.of_code(spec, base)
    (base / "own.py").write_text("")
    with pytest.raises(BadEnvironment, match=r"own\.py was changed while the run started"):
        fingerprints.copy_code(code, base, tmp_path / "code")


def test_missing_file_is_an_error_with_its_name(spec, base):
    (base / "own.py").unlink()
    with pytest.raises(BadEnvironment, match=r"cannot read .*own\.py: No such file"):
        fingerprints.of_code(spec, base)


def model_folder(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def models(spec, base, tmp_path):
    messages = []
    return fingerprints.of_models(spec, base, tmp_path / "cache", messages.append), messages


def test_local_models_are_hashed_without_files_that_are_not_read(spec, base, tmp_path):
    model_folder(base / "student", config_json="{}", model_safetensors="w", README_md="", events_log="")
    model_folder(base / "judge", config_json="[]")
    spec = evolve(spec, rewards=Table({"j": RewardModel(path="./judge"), "hub": RewardModel(path="some/model")}))
    hashes, messages = models(spec, base, tmp_path)
    assert hashes == {
        "student/config.json": sha256("{}"),
        "student/model.safetensors": sha256("w"),
        "judge/config.json": sha256("[]"),
    }
    assert messages == []


def test_file_is_read_again_only_if_it_has_changed(spec, base, tmp_path, monkeypatch):
    model_folder(base / "student", config_json="{}", model_safetensors="w")
    weights, read = base / "student/model.safetensors", []
    monkeypatch.setattr(files, "sha256_of", lambda path: read.append(path.name) or sha256(path.read_text()))

    def names_read():
        read.clear()
        models(spec, base, tmp_path)
        return sorted(read)

    assert names_read() == ["config.json", "model.safetensors"]
    assert names_read() == []
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_text("v")
    os.utime(weights, ns=times)  # same size, same time of modification
    assert names_read() == ["model.safetensors"]
    weights.unlink()
    assert names_read() == []
    weights.write_text("w")
    assert names_read() == ["model.safetensors"]
    stored = json.loads((tmp_path / "cache/hashes.json").read_text())
    assert stored[str(weights)][0] == 1


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}'])
def test_damaged_cache_is_ignored(spec, base, tmp_path, content):
    model_folder(base / "student", config_json="{}")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/hashes.json").write_text(content.replace("a", str(base / "student/config.json")))
    assert models(spec, base, tmp_path)[0] == {"student/config.json": sha256("{}")}


def test_cache_that_cannot_be_written_is_no_error(spec, base, tmp_path):
    model_folder(base / "student", config_json="{}")
    (tmp_path / "cache").write_text("a file")
    assert models(spec, base, tmp_path)[0] == {"student/config.json": sha256("{}")}


def test_slow_hashing_is_announced(spec, base, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "SLOW_BYTES", 1)
    model_folder(base / "student", config_json="{}")
    assert models(spec, base, tmp_path)[1] == ["hashing 0 GiB of local models, once"]
    assert models(spec, base, tmp_path)[1] == []


def test_differences_name_what_happened():
    before, now = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}
    assert fingerprints.differences(before, now) == {"b": "changed", "c": "gone", "d": "new"}
    assert fingerprints.differences(None, now) == {}


@pytest.fixture
def repository(tmp_path):
    """A repository with one committed file of two lines."""

    def run(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    run("init", "-q")
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    run("add", "a.py")
    run("commit", "-qm", "first")
    return tmp_path


def test_diff_can_be_applied(repository):
    assert git.diff(repository) is None
    (repository / "a.py").write_text("x = 1\ny = 3\n")
    (repository / "new.py").write_text("")
    assert git.state(repository)["changed"] == [" M a.py", "?? new.py"]
    diff = git.diff(repository)
    assert "-y = 2\n+y = 3\n" in diff
    (repository / "a.py").write_text("x = 1\ny = 2\n")
    subprocess.run(["git", "-C", repository, "apply"], input=diff, text=True, check=True)
    assert (repository / "a.py").read_text() == "x = 1\ny = 3\n"


def test_long_diff_is_cut(repository, monkeypatch):
    monkeypatch.setattr(git, "MAX_DIFF_BYTES", 30)
    (repository / "a.py").write_text("x = 2\n" * 100)
    diff = git.diff(repository)
    assert diff.startswith("diff --git")
    assert "more bytes are left out" in diff.splitlines()[-1]
    assert len(diff) < 100


def test_program_that_a_repository_configures_is_not_run(repository):
    subprocess.run(["git", "-C", repository, "config", "diff.external", "touch ran;"], check=True)
    (repository / "a.py").write_text("")
    assert "-x = 1" in git.diff(repository)
    assert not list(repository.glob("ran*"))


def test_folder_without_a_repository(tmp_path):
    assert git.state(tmp_path) is None
    assert git.diff(tmp_path) is None
