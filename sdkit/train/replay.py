"""`sdkit replay`: trains again on recorded rollouts; opens a recording and checks what may differ from it.

The tokens are the recording's; losses, teacher, rewards and optimizer may differ.  Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from sdkit.checkpoints.changeable import OPTIMIZER_STATE_KEYS, WRITER_CONNECTION, reason_fixed_on_replay, starts_with
from sdkit.language import specs
from sdkit.language.errors import BadData, UnreadableInput, counted, first_of, shorten, spelled
from sdkit.language.errors import Path as SpecPath
from sdkit.language.resolved import leaves, resolved
from sdkit.language.source import read
from sdkit.runs.directory import MARK, RunDirectory, origin, read_lines, step_file

if TYPE_CHECKING:
    from sdkit.plan.plan import Plan
    from sdkit.train.inputs import RunData


@frozen(eq=False, kw_only=True)
class Recording:
    """Rollout batches `start` to `end` (exclusive) of an earlier run."""

    run: Path
    start: int
    end: int
    settings: Mapping[SpecPath, Any]  # every scalar of the recorded run's spec
    origin: Mapping[str, Any]  # provenance.json of the recorded run

    def __str__(self) -> str:
        return f"rollout batches {self.start} to {self.end - 1} of {self.run}"

    @property
    def has_writer(self) -> bool:
        """Whether it has the answers of the writer of a teacher's context."""
        return ("teacher", "sees", "writer", "model") in self.settings

    @property
    def facts(self) -> dict[str, Any]:
        """What a replay's provenance.json records of it."""
        return {"run": str(self.run), "start": self.start, "end": self.end}

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint taken before batch `start`; None if that is the start model."""
        return _checkpoint_folder(self.run, self.start) if self.start else None

    def check_spec(self, spec: specs.ExperimentSpec, folder: Path) -> None:
        """Raise UnreadableInput if the spec would change a prompt or a token, if it needs a state that the checkpoint
        does not have, or if the replay would overwrite the recording.
        """
        if folder.resolve() == self.run:
            raise UnreadableInput(f"{folder} is the recording itself", hint="name another with --to")
        now = dict(leaves(resolved(spec)))
        changed = [path for path in dict.fromkeys([*self.settings, *now]) if self.settings.get(path) != now.get(path)]
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

    def _reason_against(self, path: SpecPath, spec: specs.ExperimentSpec) -> str | None:
        """Why the key `path` may not differ from the recorded run; None if it may."""
        sampled_by = spec.rollout.sampled_by
        if path[:2] == ("teacher", "sees") and isinstance(sampled_by, specs.TeacherSamples):
            if sampled_by.prompt == "teacher":
                return "the recording was sampled from the teacher's prompt"
        if path[:3] == ("teacher", "sees", "writer") and path not in WRITER_CONNECTION:
            if self.has_writer and spec.writer:
                return "the recording has the writer's answers"
        if self.start and any(starts_with(path, key) for key in OPTIMIZER_STATE_KEYS):
            return f"the checkpoint of step {self.start} holds it; replay from @0"
        if self.start and path[:2] == ("teacher", "weights") and _needs_teacher_state(path, spec):
            return f"the checkpoint of step {self.start} has no such teacher; replay from @0"
        return reason_fixed_on_replay(path)

    def check_rows(self, data: RunData) -> None:
        """Raise BadData if the training rows are not those of the recording."""
        columns = {p: v for p, v in self.settings.items() if p[:2] == ("data", "columns")}
        now = {p: v for p, v in leaves(resolved(data.spec)) if p[:2] == ("data", "columns")}
        recorded = self.origin.get("data", {}).get("train")
        if columns == now and recorded != data.fingerprints()["train"]:
            raise BadData(
                f"the training rows are not those that {self.run} was recorded with",
                hint="the data have changed since, or a suite holds other rows out of them",
            )

    def with_replay_backend(self, plan: Plan) -> Plan:
        """The plan with the recording as its rollout backend; evaluations are still sampled."""
        return evolve(plan, backend=specs.ReplayBackend(run=str(self.run)), backend_reason=str(self))

    def write_history(self, run: RunDirectory) -> None:
        """Copy the recorded run's metrics and evaluations before batch `start`, as if this run had been resumed there.

        The evaluation at `start` is left out: the replay repeats it under its own objective.
        """
        if not self.start:
            return
        for line in read_lines(self.run / "metrics.jsonl"):
            if line["step"] < self.start or (line["step"] == self.start and "time/step" in line):
                run.metrics(line["step"], {k: v for k, v in line.items() if k != "step"})
        for path in sorted((self.run / "evaluations").glob("step_*.jsonl")):
            if (step := _step_number(path)) < self.start:
                run.lines("evaluations", step, read_lines(path))


def open_recording(name: str, steps: int | None = None) -> Recording:
    """Returns the recording RUN@STEP, of `steps` batches or of all that follow.

    Raises UnreadableInput if RUN is not a run, has no checkpoint at STEP or lacks some of the batches.
    """
    folder, at, step = name.rpartition("@")
    if not at or not step.isdecimal():
        raise UnreadableInput(
            f"{shorten(name)} is not of the form RUN@STEP", hint=f"{name.rstrip('@')}@0 replays the whole run"
        )
    run, start = Path(folder).resolve(), int(step)
    facts = origin(run)
    settings = dict(leaves(read(run / MARK, resolved=True).data))
    if start and not _checkpoint_folder(run, start).is_dir():
        steps_saved = [0, *sorted(_step_number(p) for p in (run / "checkpoints").glob("step_*"))]
        raise UnreadableInput(
            f"{run} has no checkpoint of step {start}",
            hint=f"it can be replayed from {', '.join(f'@{n}' for n in steps_saved)}",
        )
    end = _end_batch(run, start, steps)
    size = settings["training", "prompts_per_step"] * settings["rollout", "completions_per_prompt"]
    faults = list(_missing_rollouts(run, range(start, end), size))
    if faults:
        raise UnreadableInput(f"the recording in {run} is incomplete:\n" + first_of(faults))
    return Recording(run=run, start=start, end=end, settings=settings, origin=facts)


def check_same_recording(folder: Path, recording: Recording | None) -> None:
    """Raise UnreadableInput unless the run in `folder` replays this recording, or is no replay if `recording` is None."""
    before = origin(folder).get("replayed")
    if before == (recording and recording.facts):
        return
    if before is None:
        raise UnreadableInput(f"{folder} is no replay", hint="continue it with `sdkit train --resume`")
    name, steps = f"{before['run']}@{before['start']}", before["end"] - before["start"]
    raise UnreadableInput(
        f"{folder} replays {name}",
        hint=f"continue it with `sdkit replay {name} --steps {steps} --to {folder} --resume`",
    )


def _needs_teacher_state(path: SpecPath, spec: specs.ExperimentSpec) -> bool:
    """Whether changing `path` gives a teacher whose own weights the checkpoint lacks.

    A routed teacher's weights are saved by route number, so any change of its routes counts.
    """
    moving = any(weights.follows_student for _, weights in spec.teachers())
    routed = spec.teacher is not None and isinstance(spec.teacher.weights, specs.RoutedWeights)
    return moving and (routed or path[-1] == "kind")


def _checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _step_number(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _end_batch(run: Path, start: int, steps: int | None) -> int:
    recorded = sorted(map(_step_number, (run / "rollouts").glob("step_*.jsonl")))
    end = recorded[-1] + 1 if recorded else 0
    if start >= end:
        raise UnreadableInput(f"{run} has recorded {counted(end, 'step')}, none from step {start} on")
    if steps is not None and start + steps > end:
        raise UnreadableInput(f"{run} has recorded {counted(end - start, 'step')} from step {start} on, not {steps}")
    return end if steps is None else start + steps


def _missing_rollouts(run: Path, batches: range, size: int) -> Iterator[str]:
    for batch in batches:
        path = run / step_file("rollouts", batch)
        if not path.is_file():
            yield f"{path.name} is missing"
        elif (lines := path.read_bytes().count(b"\n")) != size:
            yield f"{path.name} holds {lines} of {counted(size, 'rollout')}"
