"""Reserved names: the prefixes and single-word names of all metrics that a run writes.

A metric is named `TERM/FIGURE`, `FAMILY/…` or a single word.  Under `eval/` are the scores of a suite,
`eval/SUITE/DECODING/REWARD`, and the same `TERM/FIGURE` again.  No term, suite or decoding may have the name of a
family, since two metrics would then share a name.  tests/train/test_metric_names.py compares this list with what a
run writes.
"""

from __future__ import annotations

FAMILIES = frozenset({"eval", "keep", "lift", "loss", "memory", "reward", "rollout", "route", "teacher", "time"})
SINGLE = frozenset(
    {"grad_norm", "lr", "padding", "policy_version", "skipped_steps", "step", "teacher_distance", "tokens_generated"}
)
LENGTH_METRIC = "completion_tokens"
"""Reported next to the scores of each decoding of a suite."""
INTERVAL_SUFFIXES = ("_low", "_high", "_n")
"""Suffixes of the extra metrics of a score that has a confidence interval."""
