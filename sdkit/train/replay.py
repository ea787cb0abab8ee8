"""Recorded rollouts trained on again: from which state, to which batch, and what may be asked otherwise.

The tokens are the recording's; what they teach (losses, teacher, rewards, optimizer) may be another.  Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from sdkit.language.errors import BadData, UnreadableInput, counted, first_of, shorten, spelled
from sdkit.language.errors import Path as SpecPath
from sdkit.language.resolved import leaves, resolved
from sdkit.language.source import read
from sdkit.language.specs import (
    CopyWeights,
    EmaWeights,
    ExperimentSpec,
    ReplayBackend,
    RoutedWeights,
    TeacherSamples,
    teachers_of,
)
from sdkit.runs.directory import MARK, RunDirectory, origin, read_lines

if TYPE_CHECKING:
    from sdkit.plan.plan import Plan
    from sdkit.train.inputs import RunData

CHANGEABLE_ON_REPLAY: Sequence[SpecPath] = (
    *((key,) for key in ("losses", "teacher", "route", "rewards", "reward")),
    *((key,) for key in ("optimizer", "evaluation", "output", "machine")),
    ("data", "columns"),
    ("rollout", "keep"),
    ("training", "updates_per_rollout"),
    ("training", "micro_batch_tokens"),
    ("training", "chunk_tokens"),
    ("training", "share_prompts"),
    ("training", "zero_stage"),
)
"""What may differ from the recorded run: none of it changes a prompt or a token."""

LENGTH = "the learning rate may follow the run's length; --steps ends a replay early"
FIXED_ON_REPLAY: Mapping[SpecPath, str] = {
    ("model",): "this model sampled the recording",
    ("rollout",): "the completions are the recording's",
    ("data", "columns", "prompt"): "the prompts are the recording's",
    ("data", "columns", "system"): "the prompts are the recording's",
    ("data",): "the prompts are the recording's",
    ("training", "steps"): LENGTH,
    ("training", "epochs"): LENGTH,
    ("training",): "the recording's prompts and seeds follow from it",
}
"""Why the rest may not, by the longest beginning of its key."""

OPTIMIZER_STATE_KEYS: Sequence[SpecPath] = (
    ("optimizer", "betas"),
    ("optimizer", "eps"),
    ("optimizer", "weight_decay"),
    ("optimizer", "decay"),
    ("training", "zero_stage"),
)
"""What a checkpoint's optimizer state holds: it may differ where the replay starts from the start model."""


@frozen(eq=False, kw_only=True)
class Recording:
    """Rollout batches `start` to `end` (left out) of an earlier run."""

    run: Path
    start: int
    end: int
    settings: Mapping[SpecPath, Any]  # every scalar of the spec that recorded
    origin: Mapping[str, Any]  # its provenance

    def __str__(self) -> str:
        return f"rollout batches {self.start} to {self.end - 1} of {self.run}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the run directory of a replay says of it."""
        return {"run": str(self.run), "start": self.start, "end": self.end}

    @property
    def checkpoint(self) -> Path | None:
        """The state before batch `start`; None where that is the start model."""
        return _checkpoint_folder(self.run, self.start) if self.start else None

    def check_spec(self, spec: ExperimentSpec, folder: Path) -> None:
        """Raise UnreadableInput where the spec would change a prompt or a token, or needs a state that nobody has; and
        where the replay would be written over the recording.
        """
        if folder.resolve() == self.run:
            raise UnreadableInput(
                f"{folder} is the recording itself", hint="name another with --to"
            )
        now = dict(leaves(resolved(spec)))
        changed = [
            path
            for path in dict.fromkeys([*self.settings, *now])
            if self.settings.get(path) != now.get(path)
        ]
        faults = [
            f"{spelled(path)}: {shorten(self.settings.get(path))} then, {shorten(now.get(path))} now ({why})"
            for path in changed
            if (why := self._reason_against(path, spec))
        ]
        if faults:
            raise UnreadableInput(
                f"a replay of {self.run} cannot change\n" + first_of(faults),
                hint="train on tokens of its own with `sdkit train`",
            )

    def _reason_against(self, path: SpecPath, spec: ExperimentSpec) -> str | None:
        by = spec.rollout.sampled_by
        if path[:2] == ("teacher", "sees") and isinstance(by, TeacherSamples):
            if by.prompt == "teacher":
                return "the recording was sampled from the teacher's prompt"
        if self.start and any(_starts_with(path, each) for each in OPTIMIZER_STATE_KEYS):
            return f"the checkpoint of step {self.start} holds it; replay from @0"
        if self.start and path[:2] == ("teacher", "weights") and _needs_teacher_state(path, spec):
            return f"the checkpoint of step {self.start} has no such teacher; replay from @0"
        known = [p for p in (*CHANGEABLE_ON_REPLAY, *FIXED_ON_REPLAY) if _starts_with(path, p)]
        longest = max(known, key=len, default=())
        return (
            None
            if longest in CHANGEABLE_ON_REPLAY
            else FIXED_ON_REPLAY.get(longest, "a replay keeps it")
        )

    def check_rows(self, data: RunData) -> None:
        """Raise BadData where the training rows are not those of the recording."""
        columns = {p: v for p, v in self.settings.items() if p[:2] == ("data", "columns")}
        now = {p: v for p, v in leaves(resolved(data.spec)) if p[:2] == ("data", "columns")}
        recorded = self.origin.get("data", {}).get("train")
        if columns == now and recorded != data.fingerprints()["train"]:
            raise BadData(
                f"the training rows are not those that {self.run} was recorded with",
                hint="the data have changed since, or a suite holds other rows out of them",
            )

    def with_replay_backend(self, plan: Plan) -> Plan:
        """The plan with the recording in place of a sampler; evaluations are sampled as before."""
        return evolve(plan, backend=ReplayBackend(run=str(self.run)), why_backend=str(self))

    def write_history(self, run: RunDirectory) -> None:
        """What the recorded run had measured before batch `start`, as a resumed run would find it.

        Without the evaluation at `start` itself, which the replay makes under its own objective.
        """
        if not self.start:
            return
        for line in read_lines(self.run / "metrics.jsonl"):
            if line["step"] < self.start or (line["step"] == self.start and "time/step" in line):
                run.metrics(line["step"], {k: v for k, v in line.items() if k != "step"})
        for path in sorted((self.run / "evaluations").glob("step_*.jsonl")):
            if (step := _step_number(path)) < self.start:
                run.lines("evaluations", step, read_lines(path))


def open_recording(named: str, steps: int | None = None) -> Recording:
    """The recording called RUN@STEP, of `steps` batches or all that follow.

    Raises UnreadableInput where it is no run, has no state to start from, or not all of the batches.
    """
    name, at, step = named.rpartition("@")
    if not at or not step.isdecimal():
        raise UnreadableInput(
            f"{shorten(named)} is not of the form RUN@STEP",
            hint=f"{named.rstrip('@')}@0 replays the whole run",
        )
    run, start = Path(name).resolve(), int(step)
    facts = origin(run)
    settings = dict(leaves(read(run / MARK, resolved=True).data))
    if start and not _checkpoint_folder(run, start).is_dir():
        known = [0, *sorted(_step_number(p) for p in (run / "checkpoints").glob("step_*"))]
        raise UnreadableInput(
            f"{run} has no checkpoint of step {start}",
            hint=f"it can be replayed from {', '.join(f'@{n}' for n in known)}",
        )
    last = _end_batch(run, start, steps)
    size = settings["training", "prompts_per_step"] * settings["rollout", "completions_per_prompt"]
    faults = list(_missing_rollouts(run, range(start, last), size))
    if faults:
        raise UnreadableInput(f"the recording in {run} is incomplete:\n" + first_of(faults))
    return Recording(run=run, start=start, end=last, settings=settings, origin=facts)


def check_same_recording(folder: Path, recording: Recording | None) -> None:
    """Raise UnreadableInput where a run is continued as a replay and was none, or of another recording, or reversed."""
    before = origin(folder).get("replayed")
    if before == (recording and recording.facts):
        return
    if before is None:
        raise UnreadableInput(
            f"{folder} is no replay", hint="continue it with `sdkit train --resume`"
        )
    named, steps = f"{before['run']}@{before['start']}", before["end"] - before["start"]
    raise UnreadableInput(
        f"{folder} replays {named}",
        hint=f"continue it with `sdkit replay {named} --steps {steps} --to {folder} --resume`",
    )


def _starts_with(path: SpecPath, key: SpecPath) -> bool:
    return path[: len(key)] == key


def _needs_teacher_state(path: SpecPath, spec: ExperimentSpec) -> bool:
    """Whether a teacher that is another for this change has a state of its own; routes are counted through in it."""
    moving = [w for _, w in teachers_of(spec) if isinstance(w, EmaWeights | CopyWeights)]
    routed = spec.teacher is not None and isinstance(spec.teacher.weights, RoutedWeights)
    return bool(moving) and (routed or path[-1] == "kind")


def _checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _step_number(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _end_batch(run: Path, start: int, steps: int | None) -> int:
    recorded = sorted(map(_step_number, (run / "rollouts").glob("step_*.jsonl")))
    end = recorded[-1] + 1 if recorded else 0
    if start >= end:
        raise UnreadableInput(
            f"{run} has recorded {counted(end, 'step')}, none from step {start} on"
        )
    if steps is not None and start + steps > end:
        raise UnreadableInput(
            f"{run} has recorded {counted(end - start, 'step')} from step {start} on, not {steps}"
        )
    return end if steps is None else start + steps


def _missing_rollouts(run: Path, batches: range, size: int) -> Iterator[str]:
    for batch in batches:
        path = run / "rollouts" / f"step_{batch:06d}.jsonl"
        if not path.is_file():
            yield f"{path.name} is missing"
        elif (held := len(path.read_text(encoding="utf-8").splitlines())) != size:
            yield f"{path.name} holds {held} of {counted(size, 'rollout')}"
