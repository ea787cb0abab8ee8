"""Code and local models of a run: recorded and copied; refused by name if changed, unless an option accepts them."""

import json
import shutil
import sys
from io import StringIO

import pytest
from attrs import evolve
from rich.console import Console
from tinyruns import make_spec, metrics, train, training

from sdkit.checkpoints import manifest
from sdkit.language.errors import UnreadableInput
from sdkit.language.specs import ExternalWeights, FileReward, OutputSpec, Table
from sdkit.models.loading import hub_commit
from sdkit.train.replay import open_recording
from sdkit.train.run_origin import RunFiles, check_files, with_hub_models

SCORE = (
    "import part_of_changed_files as part\n\n\ndef score(completion, row):\n    return part.SIGN * len(completion)\n"
)
CODE = {"score.py": SCORE, "part_of_changed_files.py": "SIGN = 1\n"}


@pytest.fixture(autouse=True)
def search_path(project, monkeypatch):
    """Undoes what loading a user's file adds to the search path: here, several copies of it are loaded."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(project[0])])


@pytest.fixture(scope="module")
def project(tiny_folder, tmp_path_factory):
    """A folder with a reward, a local student and a run of two steps; and its spec."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in CODE.items():
        (folder / name).write_text(text)
    shutil.copytree(tiny_folder, folder / "student")
    spec = make_spec(
        "student",
        rewards=Table({"size": FileReward(file="score.py", function="score")}),
        training=training(steps=2),
        output=OutputSpec(checkpoint_every=1, trackers=()),
    )
    train(spec, folder / "run")
    return folder, spec


@pytest.fixture
def copy(project, tmp_path):
    """A copy of that folder for the test to change; and the spec."""
    shutil.copytree(project[0], tmp_path / "copy")
    return tmp_path / "copy", project[1]


def provenance(run):
    return json.loads((run / "provenance.json").read_text())


def copies(run):
    return {str(p.relative_to(run / "code")): p.read_text() for p in sorted((run / "code").rglob("*.py"))}


def check(folder, spec, accept=(), recording=None):
    checkpoint = None if recording else folder / "run/checkpoints/step_000001"
    return check_files(spec, folder, checkpoint, recording, accept, Console(file=StringIO()))


def test_run_and_checkpoint_name_their_files(project):
    folder, _ = project
    facts = provenance(folder / "run")
    assert set(facts["code"]) == set(CODE)
    assert {"student/config.json", "student/model.safetensors"} <= set(facts["models"])
    assert all(len(digest) == 64 for kind in ("code", "models") for digest in facts[kind].values())
    assert "accepted_changes" not in facts
    assert copies(folder / "run") == {f"step_000000/{name}": text for name, text in CODE.items()}
    origin = manifest.read(folder / "run/checkpoints/step_000001", hashes=True).origin
    assert (origin.code, origin.models) == (facts["code"], facts["models"])


def test_unchanged_files_are_accepted(copy):
    assert check(*copy).accepted == {}


def test_resume_refuses_changed_files_by_name(copy):
    folder, spec = copy
    (folder / "score.py").write_text(SCORE.replace("part.SIGN", "-1"))
    (folder / "student/config.json").write_text("{}")
    (folder / "student/chat_template.jinja").unlink(missing_ok=True)
    (folder / "student/more.json").write_text("{}")
    with pytest.raises(UnreadableInput, match="files of the run have changed since") as caught:
        train(spec, folder / "run", resume=True)
    listed = caught.value.message.splitlines()
    assert "step_000001 was written" in listed[0]
    assert {"score.py: changed", "student/config.json: changed", "student/more.json: new"} <= set(listed)
    assert caught.value.hint == (
        f"bring them back ({folder}/run/code/step_000000 has the code), "
        "or accept them as they are now with --changed-code --changed-models"
    )


def test_one_option_accepts_one_kind_of_file(copy):
    folder, spec = copy
    (folder / "part_of_changed_files.py").write_text("SIGN = -1\n")
    (folder / "student/config.json").write_text("{}")
    with pytest.raises(UnreadableInput, match=r"student/config\.json: changed") as caught:
        check(folder, spec, accept=["code"])
    assert "part_of" not in caught.value.message
    assert caught.value.hint == "bring them back, or accept them as they are now with --changed-models"
    accepted = check(folder, spec, accept=["code", "models"]).accepted
    assert {kind: list(files) for kind, files in accepted.items()} == {
        "code": ["part_of_changed_files.py"],
        "models": ["student/config.json"],
    }


def test_accepted_change_is_recorded_and_copied(copy):
    folder, spec = copy
    before = provenance(folder / "run")["code"]
    (folder / "score.py").write_text("def score(completion, row):\n    return 0\n")
    longer = evolve(spec, training=training(steps=3))
    train(longer, folder / "run", resume=True, accept=["code"])
    facts = provenance(folder / "run")
    (change,) = facts["accepted_changes"]
    assert (change["step"], change["code"]) == (1, before)
    assert list(facts["code"]) == ["score.py"]
    assert facts["code"]["score.py"] != before["score.py"]
    assert copies(folder / "run") == {
        **{f"step_000000/{name}": text for name, text in CODE.items()},
        "step_000001/score.py": (folder / "score.py").read_text(),
    }
    assert manifest.read(folder / "run/checkpoints/step_000002", hashes=True).origin.code == facts["code"]
    # No version holds for all batches of the recording.
    with pytest.raises(UnreadableInput, match=r"score\.py: changed"):
        check(folder, spec, recording=open_recording(f"{folder}/run@0"))


def test_replay_refuses_changed_files_that_both_runs_use(copy):
    folder, spec = copy
    recording = open_recording(f"{folder}/run@0")
    assert check(folder, spec, recording=recording).accepted == {}
    (folder / "other.py").write_text(SCORE)
    other = evolve(spec, rewards=Table({"size": FileReward(file="other.py", function="score")}))
    assert check(folder, other, recording=recording).accepted == {}
    (folder / "part_of_changed_files.py").write_text("SIGN = -1\n")
    for changed in (spec, other):
        with pytest.raises(UnreadableInput, match=r"run was recorded:\npart_of_changed_files\.py: changed"):
            check(folder, changed, recording=recording)


def test_replay_records_what_it_accepted(copy):
    folder, spec = copy
    (folder / "score.py").write_text(SCORE + "\n")
    options = {"recording": open_recording(f"{folder}/run@0"), "accept": ["code"]}
    replayed = train(spec, folder / "again", **options)
    assert metrics(replayed) == metrics(folder / "run")
    (change,) = provenance(replayed)["accepted_changes"]
    assert (change["step"], list(change["code"])) == (0, ["score.py"])
    assert copies(replayed)["step_000000/score.py"] == SCORE + "\n"


def forget_files(run):
    """Make a run look like one of an sdkit that recorded neither code nor local models."""
    facts = {name: value for name, value in provenance(run).items() if name not in ("code", "models")}
    (run / "provenance.json").write_text(json.dumps(facts))
    shutil.rmtree(run / "code")
    for path in run.glob("checkpoints/*/MANIFEST.json"):
        contents = json.loads(path.read_text())
        del contents["digest"], contents["origin"]["code"], contents["origin"]["models"]
        path.write_text(json.dumps({"digest": manifest._digest(contents), **contents}))


def test_run_of_an_older_version_is_resumed_and_then_recorded(copy):
    folder, spec = copy
    forget_files(folder / "run")
    assert check(folder, spec, recording=open_recording(f"{folder}/run@0")).accepted == {}
    train(evolve(spec, training=training(steps=3)), folder / "run", resume=True)
    facts = provenance(folder / "run")
    assert set(facts["code"]) == set(CODE)
    assert facts["accepted_changes"] == []
    assert set(copies(folder / "run")) == {f"step_000001/{name}" for name in CODE}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with the model org/student; sets its newest commit."""
    folder = tmp_path / "hub" / "models--org--student"

    def set_commit(commit):
        for file in (folder / "refs" / "main", folder / "snapshots" / commit / "config.json"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(commit)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent))
    return set_commit


def test_models_of_the_hub_are_known_by_their_commit(hub, process_group, tmp_path):
    """Without a `revision` the hub may give another model on resume, and the frozen teacher would be that one."""
    files, spec = RunFiles(hashes={"code": {}, "models": {}}, accepted={}), make_spec("org/student")
    assert hub_commit("org/student", None) is None
    assert with_hub_models(files, spec, tmp_path).hashes == files.hashes
    hub("first")
    began = with_hub_models(files, spec, tmp_path)
    assert began.hashes["models"] == {"org/student": "first"}
    resumed = evolve(files, before=began.hashes["models"], since="step 1")
    assert with_hub_models(resumed, spec, tmp_path).hashes == began.hashes
    hub("second")
    with pytest.raises(UnreadableInput, match="since step 1:\norg/student: commit first then, second now"):
        with_hub_models(resumed, spec, tmp_path)
    accepted = with_hub_models(evolve(resumed, accepts_models=True), spec, tmp_path)
    assert (accepted.hashes["models"], accepted.accepted) == (
        {"org/student": "second"},
        {"models": {"org/student": "first"}},
    )


def test_hub_models_are_not_missed_before_they_are_loaded(copy):
    """A checkpoint names the commits beside the files, which alone are known when the run begins to load."""
    folder, spec = copy
    path = folder / "run/checkpoints/step_000001"
    written = manifest.read(path, hashes=False)
    models = {**written.origin.models, "org/teacher": "first"}
    manifest.write(path, evolve(written, origin=evolve(written.origin, models=models)))
    spec = evolve(spec, teacher=evolve(spec.teacher, weights=ExternalWeights(path="org/teacher")))
    assert check(folder, spec).before["org/teacher"] == "first"
