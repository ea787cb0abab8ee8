"""Runs the members of a set, each in a process of its own: one after the other, or several at the same time.

A member that fails does not stop the others, unless they build on it (`stop_at_failure`).  Ctrl-C or SIGTERM is forwarded
to the running members, which stop as single runs do: after the current step, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from attrs import define, field, frozen
from rich.console import Console

from sdkit.distributed.launch import GRACE_SECONDS, POLL_SECONDS, end_with_parent
from sdkit.language.errors import ERRORS, INTERRUPTED, Diverged, ProcessDied, RunFailed, Stopped, counted
from sdkit.processes import kill_group, on_stop_signals
from sdkit.runs.directory import MARK, RunDirectory, record_failure
from sdkit.runs.run_sets import FINISHED, LOGS, Member, RunSet, clear_unstarted, is_set

Command = Callable[[Member], Sequence[str]]
"""The command that runs, or resumes, a member."""
_STOPPED = (Stopped.exit_code, INTERRUPTED)  # a member's exit codes after a request to stop


@frozen(kw_only=True)
class Options:
    """How the members of a set are run."""

    processes: int | None = None  # ranks of each member
    slots: Sequence[Mapping[str, str]] = ({},)  # an environment for each member that runs at the same time
    stop_at_failure: bool = False  # do not start members after one has failed
    seeds: Sequence[int] = ()  # each member is trained with these seeds, as a set of its own
    arguments: Sequence[str] = ()  # for runs that are resumed: further options of `sdkit train`


def train_command(run_set: RunSet, member: Member, options: Options) -> list[str]:
    """The command line that trains a member, or resumes it if its folder holds a run."""
    folder = run_set.folder(member)
    words = [sys.executable, "-m", "sdkit", "train", member.spec, *member.overrides, "--to", str(folder)]
    if options.seeds:
        words += ["--seeds", ",".join(map(str, options.seeds))]
    if options.processes:
        words += ["--processes", str(options.processes)]
    if (folder / MARK).is_file() or is_set(folder):
        words += ["--resume", *options.arguments]
    return words


def run_members(run_set: RunSet, command: Command, console: Console, options: Options) -> None:
    """Run all members that have not finished, and record the set's state in its status.json.

    Raises Stopped after a request to stop; after all other members, an error of the class of the first failure if members
    failed.
    """
    status = RunDirectory(run_set.path).status
    status("running")
    run = _Running(run_set=run_set, command=command, console=console, options=options)
    try:
        run.all()
        run.check()
    except BaseException as error:
        state = {Stopped: "stopped", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
        status(state, reason=str(error) or type(error).__name__)
        raise
    status("done")


@define
class _Child:
    member: Member
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    started: float


@define(kw_only=True)
class _Running:
    """The members that are waiting, running and have failed."""

    run_set: RunSet
    command: Command
    console: Console
    options: Options
    children: list[_Child] = field(factory=list)
    failed: dict[str, int] = field(factory=dict)  # member → exit code
    stopping: bool = False
    interrupts: list[float] = field(factory=list)  # when Ctrl-C came; the second one aborts

    def all(self) -> None:
        """Run all unfinished members."""
        waiting = self.run_set.unfinished
        self._report_finished(len(waiting))
        slots = list(self.options.slots)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [kill_group(child.process) for child in self.children])
            stack.enter_context(self._forwarding())
            while waiting or self.children:
                while waiting and slots and not self._ends:
                    self._start(waiting.pop(0), slots.pop(0))
                for child in [child for child in self.children if child.process.poll() is not None]:
                    self.children.remove(child)
                    slots.append(child.environment)
                    self._ended(child)
                if self._ends and not self.children:
                    return
                if self._aborts and time.monotonic() > self.interrupts[1] + GRACE_SECONDS:
                    return
                time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise if the set was stopped, or if members have failed."""
        states = self.run_set.states()
        if self._aborts:
            raise KeyboardInterrupt
        if self.stopping:
            left = [f"{name} ({state})" for name, state in states.items() if state not in FINISHED]
            raise Stopped(
                f"stopped: {len(states) - len(left)} of {counted(len(states), 'run')} are finished; "
                f"left: {', '.join(left) or 'none'}",
                hint="continue with --resume",
            )
        if not self.failed:
            return
        code = next(iter(self.failed.values()))
        names = ", ".join(f"{name} (exit code {code})" for name, code in self.failed.items())
        unstarted = [name for name, state in states.items() if state == "not started" and name not in self.failed]
        rest = f"; not started: {', '.join(unstarted)}" if unstarted else ""
        raise ERRORS.get(code, RunFailed)(
            f"{counted(len(self.failed), 'run')} of {len(states)} failed: {names}{rest}",
            hint="the reason is above, and in the run's status.json; --resume repeats what is not finished",
        )

    @property
    def _aborts(self) -> bool:
        return len(self.interrupts) > 1

    @property
    def _ends(self) -> bool:
        """Whether no further member is started."""
        return self.stopping or (self.options.stop_at_failure and bool(self.failed))

    @property
    def _is_parallel(self) -> bool:
        return len(self.options.slots) > 1

    def _report_finished(self, waiting: int) -> None:
        finished = len(self.run_set.members) - waiting
        if finished:
            self._say(f"{finished} of {counted(len(self.run_set.members), 'run')} are finished already")

    def _start(self, member: Member, environment: Mapping[str, str]) -> None:
        place = 1 + self.run_set.members.index(member)
        before = self.run_set.state(member)
        verb = "starting" if before == "not started" else f"resuming ({before})"
        clear_unstarted(self.run_set.folder(member))
        output = self._log(member) if self._is_parallel else None
        where = f", output in {output.name}" if output else ""
        self._say(f"{verb} {member.name}, {place} of {len(self.run_set.members)}{where}")
        # In its own session, so that Ctrl-C reaches only this process, which forwards it once.
        process = subprocess.Popen(
            self.command(member),
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        if output:
            output.close()
        self.children.append(_Child(member, process, environment, time.monotonic()))
        if self.stopping:  # the request came while the process was started
            process.terminate()

    def _log(self, member: Member) -> IO[bytes]:
        folder = self.run_set.path / LOGS
        folder.mkdir(exist_ok=True)
        return (folder / f"{member.name}.log").open("ab")

    def _ended(self, child: _Child) -> None:
        code, name = child.process.wait(), child.member.name
        folder = self.run_set.folder(child.member)
        if code < 0:
            record_failure(folder, f"killed by {signal.Signals(-code).name}")
            code = ProcessDied.exit_code
        self.stopping |= code in _STOPPED  # also if somebody stopped only this member
        minutes = (time.monotonic() - child.started) / 60
        self._say(f"{name}: {self.run_set.state(child.member)} after {minutes:.1f} min")
        if code not in (0, Diverged.exit_code) and not self.stopping:
            self.failed[name] = code
            if self._is_parallel:
                self._show_end(self.run_set.path / LOGS / f"{name}.log")

    def _show_end(self, log: Path) -> None:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]:
            self._say(f"  {line}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Forward SIGINT and SIGTERM to every running member."""

        def forward(number: int, _frame: Any) -> None:
            self.stopping = True
            self.interrupts += [time.monotonic()] if number == signal.SIGINT else []
            for child in self.children:
                if child.process.poll() is None:
                    child.process.send_signal(number)

        with on_stop_signals(forward):
            yield
