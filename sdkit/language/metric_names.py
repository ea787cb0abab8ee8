"""The first parts of the names of all metrics that a run writes.

No term, suite or decoding may have the name of a family: two figures would be written as one.
A metric is `TERM/FIGURE`, `FAMILY/…` or a single word; under `eval/` stand a suite's scores, `eval/SUITE/DECODING/REWARD`,
and the same `TERM/FIGURE` again.  tests/train/test_metric_names.py compares this list with what a run writes.
"""

from __future__ import annotations

FAMILIES = frozenset(
    {
        "eval",
        "keep",
        "lift",
        "loss",
        "memory",
        "reward",
        "rollout",
        "route",
        "teacher",
        "time",
    }
)
SINGLE = frozenset(
    {
        "grad_norm",
        "lr",
        "padding",
        "policy_version",
        "skipped_steps",
        "step",
        "teacher_distance",
        "tokens_generated",
    }
)
LENGTH_METRIC = "completion_tokens"
"""What stands beside the scores of a suite's decoding."""
INTERVAL_SUFFIXES = ("_low", "_high", "_n")
"""What follows the name of a score that has an interval."""
