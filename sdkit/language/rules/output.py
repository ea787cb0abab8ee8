"""What a run writes: the packages of its trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from sdkit.language.rules.base import Context, Finding, run_rule
from sdkit.language.specs import ExperimentSpec


@run_rule("a tracker's package is installed")
def tracker_package(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`wandb` and `trackio` are extras of sdkit.  A tracker that is missing would leave a run untracked."""
    for position, name in enumerate(spec.output.trackers):
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            where = ("output", "trackers", position)
            yield where, f"the package {name} is not installed", f"pip install 'sdkit[{name}]', or remove the tracker"
