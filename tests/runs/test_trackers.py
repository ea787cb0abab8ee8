"""Trackers: what each is given, that a failing or slow one ends no run, and the files of wandb and Trackio read back."""

import json
import os
import threading

import pytest

from sdkit.runs import trackers
from sdkit.runs.directory import RunDirectory
from sdkit.runs.trackers import TrackedRun, Trackers, wandb_is_set_up

ID = "0123456789abcdef"
SAMPLE = {
    "row": 3,
    "prompt": "2 + 2?",
    "teacher_prompt": None,
    "completion": "4",
    "finished": True,
    "rewards": {"r": 1.0},
}


class FakeTracker:
    """Records its calls; fails, or waits, at the metrics of one step."""

    calls: list
    fails_at: int | None = None
    waits: threading.Event | None = None

    def __init__(self, run):
        self.calls.append(("open", run))

    def metrics(self, step, values):
        if step == self.fails_at:
            raise SystemExit("no\nnetwork")
        if self.waits:
            self.waits.wait(30)
        self.calls.append((step, dict(values)))

    def text(self, name, step, text):
        self.calls.append((name, step, text))

    def samples(self, step, records):
        self.calls.append(("samples", step, list(records)))

    def results(self, settings, results, step):
        self.calls.append(("results", step, dict(results)))

    def close(self):
        self.calls.append("close")


@pytest.fixture
def fake(monkeypatch):
    """Two trackers that only record, `fake` and `other`."""
    made = {name: type(name, (FakeTracker,), {"calls": []}) for name in ("fake", "other")}
    monkeypatch.setattr(trackers, "OPEN", made)
    return made


def described(tmp_path, **changes):
    return lambda: TrackedRun(folder=tmp_path, id=ID, settings={}, **changes)


def test_calls_arrive_in_order_and_as_numbers(fake, tmp_path):
    tracked = Trackers(("fake",))
    tracked.start(described(tmp_path))
    tracked.text("objective", 0, "KL")
    tracked.metrics(1, {"loss": 2.0, "note": "text"})
    tracked.samples(1, [SAMPLE])
    tracked.results({}, {"loss": 2.0}, 1)
    tracked.close()
    assert fake["fake"].calls[1:] == [
        ("objective", 0, "KL"),
        (1, {"loss": 2.0}),
        ("samples", 1, [SAMPLE]),
        ("results", 1, {"loss": 2.0}),
        "close",
    ]


def test_tracker_that_fails_is_warned_about_once_and_the_others_go_on(fake, tmp_path):
    fake["fake"].fails_at = 1
    warnings = []
    tracked = Trackers(("fake", "other"), warn=warnings.append)
    tracked.start(described(tmp_path))
    for step in range(4):
        tracked.metrics(step, {"loss": 2.0})
    tracked.close()
    assert warnings == ["fake failed, and the run goes on without it: no network"]
    assert fake["fake"].calls[1:] == [(0, {"loss": 2.0})]
    assert fake["other"].calls[1:] == [*((step, {"loss": 2.0}) for step in range(4)), "close"]


def test_tracker_that_cannot_open_is_warned_about(monkeypatch, tmp_path):
    def refuse(run):
        raise ValueError("no database")

    monkeypatch.setattr(trackers, "OPEN", {"fake": refuse})
    warnings = []
    tracked = Trackers(("fake",), warn=warnings.append)
    tracked.start(described(tmp_path))
    tracked.metrics(1, {"loss": 2.0})
    tracked.close()
    assert warnings == ["fake failed, and the run goes on without it: no database"]


def test_slow_tracker_delays_neither_steps_nor_the_end(fake, tmp_path):
    fake["fake"].waits = threading.Event()
    warnings = []
    tracked = Trackers(("fake",), warn=warnings.append, end_seconds=0.05)
    tracked.start(described(tmp_path))
    for step in range(100):
        tracked.metrics(step, {"loss": 2.0})
    tracked.close()
    fake["fake"].waits.set()
    assert warnings == ["fake has not taken everything after 0.05 s; the run goes on without it"]


def test_resumed_run_tells_its_id_and_where_it_begins(fake, tmp_path):
    write_origin(tmp_path)
    run = RunDirectory(tmp_path, Trackers(("fake",)))
    run.forget_after(4)
    run.metrics(5, {"loss": 1.0})
    run.close()
    (_, told), *_ = fake["fake"].calls
    assert (told.id, told.purge_from, told.settings) == (ID, 5, {"optimizer": {"lr": 0.1}})


@pytest.mark.parametrize(
    ("environment", "netrc", "is_set_up"),
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "k"}, "", True),
        ({}, "machine api.wandb.ai login user password k", True),
        ({"WANDB_BASE_URL": "https://other.org"}, "machine api.wandb.ai login user password k", False),
        ({"WANDB_BASE_URL": "https://other.org/x"}, "machine other.org login user password k", True),
        ({}, "no netrc", False),
    ],
)
def test_wandb_is_offline_unless_the_user_has_logged_in(environment, netrc, is_set_up, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_is_set_up() == is_set_up


def write_origin(folder):
    folder.mkdir(exist_ok=True)
    (folder / "provenance.json").write_text(json.dumps({"run": ID}))
    (folder / "resolved.yaml").write_text('{"optimizer": {"lr": 0.1}}')


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A run of three steps that was stopped after the second and resumed after the first, tracked offline."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    base = tmp_path_factory.mktemp("tracked")
    folder = base / "run"
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith(("WANDB", "TRACKIO"))]:
        patch.delenv(name)
    patch.setenv("NETRC", str(base / "netrc"))
    for place in ("trackio.utils", "trackio.sqlite_storage"):
        patch.setattr(f"{place}.TRACKIO_DIR", base / "trackio")
    write_origin(folder)
    warnings = []
    try:
        for first, resumed_after in ((1, None), (2, 1)):
            run = RunDirectory(folder, Trackers(("wandb", "trackio"), warn=warnings.append, end_seconds=600.0))
            if resumed_after is not None:
                run.forget_after(resumed_after)
            for step in range(first, first + 2):
                run.metrics(step, {"loss": 10.0 * first + step, "eval/sums/greedy/right": 0.5})
            run.samples(first, [SAMPLE], "# Samples")
            run.results({}, {"loss": 1.0}, step)
            run.close()
        from trackio.sqlite_storage import SQLiteStorage

        runs = SQLiteStorage.get_runs("sdkit")
        name = f"run-{ID[:8]}"
        yield (
            folder,
            warnings,
            (runs, SQLiteStorage.get_logs("sdkit", name), SQLiteStorage.get_run_config("sdkit", name)),
        )
    finally:
        patch.undo()


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, each a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends with zeros where no header fits
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(records):
    """The items of each history record."""
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            yield {name: value for name, value in items.items() if not name.startswith("_")}


def test_wandb_writes_metrics_settings_and_samples_offline(twice):
    folder, warnings, _ = twice
    assert warnings == []
    first, second = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    for place, start in ((first, 1), (second, 2)):
        (file,) = place.glob("*.wandb")
        records = list(wandb_records(file))
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        assert (run.run_id, run.project, run.display_name) == (ID, "sdkit", "run")
        assert {u.key: json.loads(u.value_json) for u in run.config.update}["optimizer"] == {"lr": 0.1}
        history = list(wandb_history(records))
        assert [(h["step"], h["loss"]) for h in history if "loss" in h] == [
            (s, 10.0 * start + s) for s in (start, start + 1)
        ]
        (table,) = place.glob("files/media/table/samples_*.table.json")
        content = json.loads(table.read_text())
        assert content["columns"] == list(trackers.COLUMNS)
        assert content["data"] == [[3, "2 + 2?", None, "4", True, "r 1"]]


def test_trackio_appends_a_resumed_run(twice):
    runs, logs, config = twice[2]
    assert runs == [f"run-{ID[:8]}"]
    assert config["optimizer"] == {"lr": 0.1}
    losses = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    assert losses == [(1, 11.0), (2, 12.0), (2, 22.0), (3, 23.0)]
    tables = [log["samples"] for log in logs if "samples" in log]
    assert len(tables) == 2
    assert tables[0]["_value"][0]["completion"] == "4"


def test_no_secret_is_written(twice):
    folder, *_ = twice
    secrets = [value.encode() for name, value in os.environ.items() if "KEY" in name or "TOKEN" in name]
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not [secret for secret in secrets if len(secret) > 8 and secret in content]
