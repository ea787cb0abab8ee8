"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.  Each gets the same metrics, settings and samples.

A tracker works in a thread of its own.  If it fails, it is closed and warned about once; if it is slow, the run goes on and
waits for it only at the end, for `END_SECONDS` at most.  Nothing is sent anywhere unless the user's tracker is set up so.
"""

from __future__ import annotations

import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from attrs import define, field, frozen

from sdkit.language.errors import one_line
from sdkit.processes import DaemonThreads

END_SECONDS = 60.0
"""How long the end of a run waits for a tracker."""
PROJECT = "sdkit"
"""The project of tracked runs, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""
COLUMNS = ("row", "prompt", "teacher_prompt", "completion", "finished", "rewards")
"""The columns of the table of samples."""


@frozen(kw_only=True)
class TrackedRun:
    """What a tracker is told of a run when it starts."""

    folder: Path  # the run directory
    id: str  # of the run in provenance.json: a resumed run has the same
    settings: Mapping[str, Any]  # the resolved spec
    purge_from: int | None = None  # a resumed run writes this step and all later ones again


class Tracker(Protocol):
    """One open tracker."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def text(self, name: str, step: int, text: str) -> None:
        """Record a text in Markdown."""
        ...

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Record rollouts as a table."""
        ...

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """Record what the run came to, by its settings, for a table of runs."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorboardTracker:
    """TensorBoard events in the run directory.  It shows no tables: samples are among the texts."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.purge_from)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, name: str, step: int, text: str) -> None:
        self._writer.add_text(name, text, step)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None: ...

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        scalars = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
        self._writer.add_hparams(scalars, dict(results), run_name=".", global_step=step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases, with its files in the run directory; offline unless the user has logged in or set WANDB_MODE."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=os.environ.get("WANDB_NAME", run.folder.name),
            dir=str(run.folder),
            config=dict(run.settings),
            resume="allow",
            mode=None if os.environ.get("WANDB_MODE") or wandb_is_set_up() else "offline",
            # The address of a git remote and what a terminal shows may hold secrets; the run directory has both otherwise.
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        # wandb refuses to go back to an earlier step, as a resumed run does, on its own axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def text(self, name: str, step: int, text: str) -> None: ...

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        table = self._wandb.Table(columns=list(COLUMNS), data=_rows(records))
        self._run.log({"step": step, "samples": table})

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(results))

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """Trackio, in its local database unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio
        import trackio.run
        import trackio.utils

        for module in (trackio, trackio.run, trackio.utils):
            module.__dict__["print"] = _discard  # redirecting stdout in a thread would redirect that of the run
        if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
            trackio.run.__dict__["_get_default_namespace"] = _discard  # asks the Hugging Face hub for the user's name
        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.folder.name}-{run.id[:8]}",
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, step: int, text: str) -> None: ...

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=_rows(records))
        self._run.log({"samples": table}, step=step)

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None:
        self._run.finish()


OPEN: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}
"""By name, as in `output.trackers`."""


@define(eq=False)
class Trackers:
    """The trackers of a run, in the order of the spec.  They open with the first call of `start`."""

    names: Sequence[str] = ()
    warn: Callable[[str], None] = print
    end_seconds: float = END_SECONDS
    _threads: dict[str, _TrackerThread] = field(factory=dict, init=False)

    def start(self, describe: Callable[[], TrackedRun]) -> None:
        """Open the trackers that are not open yet; `describe` tells what they need of the run."""
        missing = [name for name in self.names if name not in self._threads]
        if missing:
            run = describe()
            self._threads |= {name: _TrackerThread(OPEN[name], run, name) for name in missing}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step under their names; what is no number is left out."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._submit(lambda tracker: tracker.metrics(step, numbers))

    def text(self, name: str, step: int, text: str) -> None:
        """Record a text in Markdown, in the trackers that show texts."""
        self._submit(lambda tracker: tracker.text(name, step, text))

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Record rollouts as a table, in the trackers that show tables."""
        self._submit(lambda tracker: tracker.samples(step, records))

    def results(self, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """Record the results after `step`, by settings, in the trackers that have a table of runs."""
        self._submit(lambda tracker: tracker.results(settings, results, step))

    def close(self) -> None:
        """Close all trackers; waits for `end_seconds` altogether at most."""
        deadline = time.monotonic() + self.end_seconds
        self._submit(lambda tracker: tracker.close())
        for name, thread in self._threads.items():
            if not thread.end(max(deadline - time.monotonic(), 0.0)):
                self.warn(f"{name} has not taken everything after {self.end_seconds:g} s; the run goes on without it")
        self._report()
        self._threads.clear()

    def _submit(self, call: Callable[[Tracker], None]) -> None:
        self._report()
        for thread in self._threads.values():
            thread.submit(call)

    def _report(self) -> None:
        for name, thread in self._threads.items():
            if failure := thread.take_failure():
                self.warn(f"{name} failed, and the run goes on without it: {failure}")


class _TrackerThread:
    """A tracker in a thread of its own, which calls it in order until it fails."""

    def __init__(self, open_tracker: Callable[[TrackedRun], Tracker], run: TrackedRun, name: str) -> None:
        self._threads = DaemonThreads(1, f"tracker {name}")
        self._tracker: Tracker | None = None
        self._failure: str | None = None
        self._last: Future[None] = self._threads.submit(lambda: self._guard(lambda: self._open(open_tracker, run)))

    def submit(self, call: Callable[[Tracker], None]) -> None:
        self._last = self._threads.submit(lambda: self._guard(lambda: self._call(call)))

    def take_failure(self) -> str | None:
        """Returns why the tracker has failed, once."""
        failure, self._failure = self._failure, None
        return failure

    def end(self, seconds: float) -> bool:
        """Wait for all calls, and end the thread; returns False if they take longer than `seconds`."""
        self._threads.end(seconds)
        return self._last.done()

    def _open(self, open_tracker: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        self._tracker = open_tracker(run)

    def _call(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker:
            call(self._tracker)

    def _guard(self, function: Callable[[], None]) -> None:
        """Call a function of a foreign package, which may raise anything, SystemExit included."""
        try:
            function()
        except BaseException as error:
            self._tracker = None
            self._failure = one_line(error, 200)


def wandb_is_set_up() -> bool:
    """Whether the user has logged in to Weights & Biases: by a key in the environment, or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def _rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The table of samples, a row for each record."""
    return [[_cell(record.get(name)) for name in COLUMNS] for record in records]


def _cell(value: Any) -> Any:
    """A value in a cell of a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _discard(*_: Any, **__: Any) -> None: ...
