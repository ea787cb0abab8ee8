"""Tripwires for a collapse: of the completions' length or entropy, or of the score."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from sdkit.language.specs.fields import AT_LEAST_ONE, INSIDE_SHARE, spec_field

Action = Literal["warn", "stop"]
_ACTION = "`warn`, or `stop`: save a checkpoint and end the run as diverged; `--resume` continues it"


@frozen(kw_only=True)
class StepCollapse:
    """Goes off when a mean over a step's rollouts stays far below its median in the run's earlier steps."""

    share: float = spec_field("share of that median below which a step counts", default=0.1, range=INSIDE_SHARE)
    steps: int = spec_field("such steps in a row", default=10, range=AT_LEAST_ONE)
    action: Action = spec_field(_ACTION, default="warn")


@frozen(kw_only=True)
class ScoreCollapse:
    """Goes off when the headline score stays far below its best in the run, by more than chance."""

    share: float = spec_field(
        "share of the best score below which an evaluation counts", default=0.5, range=INSIDE_SHARE
    )
    evaluations: int = spec_field("such evaluations in a row", default=2, range=AT_LEAST_ONE)
    action: Action = spec_field(_ACTION, default="warn")


@frozen(kw_only=True)
class CollapseSpec:
    """Tripwires for a run that collapses; null turns one off."""

    length: StepCollapse | None = spec_field("of the mean completion length", default=StepCollapse())
    entropy: StepCollapse | None = spec_field(
        "of the entropy at sampled tokens (`rollout/entropy`); not for completions from the data",
        default=StepCollapse(),
    )
    score: ScoreCollapse | None = spec_field(
        "of the headline score; a run whose last evaluation counts ends as diverged", default=ScoreCollapse()
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The keys of the tripwires that end the run."""
        wires = {"length": self.length, "entropy": self.entropy, "score": self.score}
        return tuple(name for name, wire in wires.items() if wire is not None and wire.action == "stop")
