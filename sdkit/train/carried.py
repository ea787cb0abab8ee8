"""What a stage of a sequence takes over from the stage before, besides its weights: the optimizer's state, the teacher's."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from attrs import frozen

from sdkit.checkpoints import checkpoint, manifest
from sdkit.distributed import collectives
from sdkit.distributed.launch import launched
from sdkit.language.errors import UnreadableInput, counted


@frozen(kw_only=True)
class Carried:
    """Parts of the last checkpoint of a finished run."""

    parts: Collection[checkpoint.Part]
    before: Path | None  # run directory of the stage before; None for the first stage

    def check(self) -> None:
        """Raise UnreadableInput if the stage before has no intact checkpoint of its last step for as many ranks."""
        if self.before is None:
            return
        saved, ranks = self._saved(self.before), launched() or 1
        try:
            facts = manifest.read(saved, hashes=True)
        except manifest.UnusableCheckpoint as error:
            raise UnreadableInput(f"{saved} {error}", hint="run the stage before again") from None
        if facts.origin.ranks != ranks:
            raise UnreadableInput(
                f"{saved} fits {counted(facts.origin.ranks, 'rank')}, but there are {ranks} now",
                hint=f"continue with --processes {facts.origin.ranks}",
            )

    def load(self, state: checkpoint.TrainState) -> None:
        """Load the parts into a state at its first step; every rank must call."""
        if self.before is not None:
            checkpoint.load_parts(state, collectives.broadcast_object(self._saved(self.before)), self.parts)

    def _saved(self, run: Path) -> Path:
        step = checkpoint.newest_step(run)
        if not step:
            raise UnreadableInput(f"{run} has no checkpoint of its end to carry over from")
        return run / "checkpoints" / f"step_{step:06d}"
