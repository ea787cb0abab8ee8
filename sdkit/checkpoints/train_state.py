"""The parts of a run that change, which a checkpoint stores."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from attrs import define, frozen

from sdkit.distributed.zero import Zero
from sdkit.models.teachers import Teacher


@define(eq=False)
class Progress:
    """How far a run has come."""

    step: int = 0  # rollout batches trained on
    optimizer_steps: int = 0  # optimizer steps applied: the policy version
    skipped: int = 0  # optimizer steps in a row that were skipped

    def record(self, *, applied: bool) -> None:
        """Count an optimizer step."""
        self.optimizer_steps += applied
        self.skipped = 0 if applied else self.skipped + 1


class Prefetched(Protocol):
    """Rollout batches that are sampled and not yet trained on (train/prefetch.py)."""

    def wait(self) -> None: ...
    def write(self, folder: Path) -> None: ...
    def read(self, folder: Path) -> None: ...


@frozen(eq=False, kw_only=True)
class TrainState:
    """Everything that changes during a run; the random streams belong to the process (rng.py)."""

    zero: Zero  # the student and the optimizer
    teacher: Teacher | None
    prefetched: Prefetched | None
    progress: Progress
