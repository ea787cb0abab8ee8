"""What a run is asked to do: its spec, plan, data and paths."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from sdkit.language.specs import ExperimentSpec
from sdkit.plan.plan import Plan
from sdkit.train.inputs import RunData


@frozen(eq=False, kw_only=True)
class RunSetup:
    """The spec of a run and what is derived from it before models are loaded."""

    spec: ExperimentSpec
    plan: Plan
    base: Path  # paths in the spec are relative to it
    data: RunData
    model_folder: str
    longest_sequence: int  # tokens of the longest prompt and its completion
    end: int  # rollout batches after which the run ends: a replay may have fewer than the plan
