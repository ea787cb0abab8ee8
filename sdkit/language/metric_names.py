"""Every metric that a run writes: its name, formula, unit and healthy range.  docs/metrics.md is this table.

In a name, words in capitals stand for names of the spec, and METRIC for another metric.  No term, suite or decoding
may have the name of a family (`eval`, `rollout`, …), since two metrics would then share a name.
tests/train/test_metric_names.py compares the table with what runs write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

from attrs import frozen

LENGTH_METRIC = "completion_tokens"
"""Reported next to the scores of each decoding of a suite."""
MEASURES: Mapping[str, Literal["higher", "lower"] | None] = {
    LENGTH_METRIC: None,
    "cut_at_limit": "lower",
    "self_repetition": "lower",
    "entropy": None,
    "distinct_1": None,
    "distinct_2": None,
}
"""What evaluations report of each decoding besides scores, and which is better; None: it depends on the task."""
BOUNDED_MEASURES = frozenset({"cut_at_limit", "self_repetition", "distinct_1", "distinct_2"})
"""The measures that are shares, from 0 to 1."""
PASS_AT = "pass_at_"
"""Begins the names of pass@k, which stand beside rewards."""


WITHIN = "within_"
"""Begins the name of the score of success within so many turns."""
GIVEN_FAILURE = "given_failure_"
"""Begins the name of the metric of success in a turn after failures."""
TURNS_TO_SUCCESS = "turns_to_success"
"""The metric of the mean turn of the first success."""
SCORE_PREFIXES = (PASS_AT, WITHIN, GIVEN_FAILURE, TURNS_TO_SUCCESS)


def pass_at(k: int) -> str:
    """The name of pass@k."""
    return f"{PASS_AT}{k}"


def attempts(samples: int) -> list[int]:
    """The k for which pass@k is reported: the powers of two up to the number of samples, and that number."""
    return sorted({samples, *(1 << i for i in range(samples.bit_length()))} - {0})


INTERVAL_SUFFIXES = ("_low", "_high", "_n")
"""Suffixes of the extra metrics of a score that has a confidence interval."""


@frozen
class Metric:
    """A metric, or all that a pattern names."""

    name: str
    formula: str
    unit: str
    healthy: str = ""  # empty: it depends on the task


STEP = (
    Metric("step", "rollout batches trained on so far; a line of an evaluation has the step before it", "count"),
    Metric(
        "loss",
        "Σ over terms of coefficient × average of weight × correction × ℓ",
        "nats, for divergences",
        "finite; below 20 × its median so far",
    ),
    Metric("loss/TERM", "the term's part of `loss`", "as `loss`"),
    Metric(
        "grad_norm",
        "L2 norm of the gradient of all trained parameters, before clipping",
        "`loss` per unit of weight",
        "above 1e-6; below 20 × its median so far",
    ),
    Metric("lr", "learning rate, mean over the step's updates", "1", "as scheduled"),
    Metric("skipped_steps", "updates that were not applied because a gradient was not finite", "count", "0"),
    Metric("policy_version", "optimizer steps applied so far", "count"),
    Metric("padding", "1 − tokens / positions of the micro-batches of the student", "share", "the lower, the faster"),
    Metric("tokens_generated", "tokens sampled for training so far", "count"),
    Metric(
        "teacher_distance",
        "‖teacher − student‖ / ‖student‖ over all weights, when the teacher last changed",
        "1",
        "small and steady: the teacher follows",
    ),
    Metric("memory/peak_gib", "largest resident memory of the first process so far", "GiB", "below the machine's"),
    Metric("memory/device_allocated_gib", "largest memory of tensors on a GPU so far, over ranks", "GiB"),
    Metric(
        "memory/device_reserved_gib",
        "largest memory that PyTorch took from a GPU so far, over ranks",
        "GiB",
        "below the GPU's",
    ),
)
TERM = (
    Metric("TERM/tokens", "counted tokens: weight above 0 after mask, route and teacher", "count", "above 0"),
    Metric("TERM/empty_rows", "rollouts without a counted token / rollouts", "share", "well below 1"),
    Metric("TERM/token_loss", "mean of ℓ, without weights and corrections", "nats, for divergences"),
    Metric(
        "TERM/student_entropy",
        "mean of −Σ S log S over the vocabulary",
        "nats",
        "falls slowly; near 0, samples no longer differ",
    ),
    Metric("TERM/teacher_entropy", "mean of −Σ T log T over the vocabulary", "nats", "at most the student's"),
    Metric(
        "TERM/k1",
        "mean of log S(y) − log T(y) at the sampled tokens y; of a reference_kl term, T is the reference",
        "nats",
        "positive and falling; it estimates KL(S‖T)",
    ),
    Metric("TERM/forward_kl", "mean of Σ T (log T − log S) on the support", "nats", "falling; above 1e-6"),
    Metric("TERM/reverse_kl", "mean of Σ S (log S − log T) on the support", "nats", "falling; above 1e-6"),
    Metric(
        "TERM/reference_kl", "mean of Σ S (log S − log R) over the vocabulary, R the reference", "nats", "grows slowly"
    ),
    Metric("TERM/student_mass", "the student's probability of the top-k support", "share", "near 1"),
    Metric("TERM/teacher_mass", "the teacher's probability of the top-k support", "share", "near 1"),
    Metric("TERM/overlap", "ids that are in both sides' top k / k", "share", "rises"),
    Metric("TERM/token_clipped", "tokens whose ℓ exceeds clip.token", "share", "rare"),
    Metric(
        "TERM/ratio", "mean of exp(log S now − log S before this batch)", "1", "1 at the first update, then near 1"
    ),
    Metric("TERM/advantage", "mean advantage", "as the reward, or nats", "near 0 for group_relative"),
    Metric("TERM/old_kl", "mean of r − 1 − log r, r = S now / S before this batch", "nats", "below 0.1"),
    Metric("TERM/clip_low", "tokens whose ratio is below the clip while the advantage is negative", "share", "rare"),
    Metric("TERM/clip_high", "tokens whose ratio is above the clip while the advantage is positive", "share", "rare"),
    Metric("TERM/clip_dual", "tokens with negative advantage whose ratio exceeds clip.dual", "share", "rare"),
    Metric("TERM/old_ratio", "mean of min(exp(log S now − log S before this batch), cap)", "1", "near 1"),
    Metric("TERM/sampler_ratio", "mean of min(exp(log S of the trainer − log S of the sampler), cap)", "1", "near 1"),
    Metric("TERM/ratio_capped", "tokens at which a cap binds", "share", "rare"),
    Metric("TERM/KEY", "value of the schedule under this key of the term", "as the key", "as scheduled"),
    Metric("route/then", "rollouts on this branch of the route / rollouts", "share"),
    Metric("route/otherwise", "rollouts on this branch of the route / rollouts", "share"),
)
ROLLOUTS = (
    Metric("reward/REWARD", "mean reward of the rollouts", "as the reward", "rises; neither 0 nor 1 throughout"),
    Metric("rollout/tokens", "sampled tokens", "count"),
    Metric("rollout/completion_tokens", "mean number of sampled tokens of a completion", "tokens", "steady"),
    Metric(
        "trajectory/turns",
        "mean number of sampled turns of a trajectory",
        "turns",
        "falls as more first turns are right",
    ),
    Metric(
        "trajectory/demonstrated_turns",
        "mean number of a demonstration's turns that a trajectory started with",
        "turns",
        "as rollout.sampled_by.starts_with is scheduled",
    ),
    Metric(
        "trajectory/ended_in_demonstration",
        "trajectories that ended before the student took over / trajectories; they are not trained on",
        "share",
        "near 0",
    ),
    Metric(
        "trajectory/turns_with_teacher",
        "turns for which the teacher's context, which differs by turn, is filled / turns",
        "share",
        "above 0",
    ),
    Metric("trajectory/ending_done", "trajectories that the environment ended / trajectories", "share", "rises"),
    Metric("trajectory/ending_no_call", "trajectories whose last turn called no tool / trajectories", "share"),
    Metric(
        "trajectory/ending_max_turns", "trajectories that had environment.max_turns / trajectories", "share", "falls"
    ),
    Metric("trajectory/ending_length", "trajectories whose last turn was cut / trajectories", "share", "near 0"),
    Metric(
        "trajectory/ending_max_tokens", "trajectories cut at their limit of tokens / trajectories", "share", "near 0"
    ),
    Metric(
        "trajectory/ending_parse_error",
        "trajectories that ended with a tool call that cannot be read / trajectories",
        "share",
        "near 0",
    ),
    Metric(
        "trajectory/ending_timeout",
        "trajectories that reached environment.trajectory_seconds / trajectories",
        "share",
        "near 0",
    ),
    Metric(
        "trajectory/ending_environment_error",
        "trajectories whose environment failed / trajectories; they are not trained on",
        "share",
        "0",
    ),
    Metric("trajectory/observation_tokens", "mean number of tokens between the turns of a trajectory", "tokens"),
    Metric(
        "rollout/entropy",
        "mean of −log p(y) at the sampled tokens y, p as sampled from: an estimate of its entropy; not for the data set's",
        "nats per token",
        "falls slowly; near 0, samples no longer differ",
    ),
    Metric("rollout/finished", "completions that ended by themselves / completions", "share", "near 1"),
    Metric("rollout/with_teacher", "rollouts that have a teacher prompt / rollouts", "share", "above 0"),
    Metric("rollout/kept", "rollouts that pass every filter of rollout.keep / rollouts", "share", "above 0"),
    Metric("keep/FILTER", "rollouts that pass this filter / rollouts", "share", "above 0"),
    Metric("rollout/no_advantage", "rollouts with advantage 0 / rollouts", "share", "below 1"),
    Metric(
        "rollout/constant_groups", "groups whose rollouts all have the same reward / groups", "share", "well below 1"
    ),
    Metric(
        "rollout/cut_completions",
        "completions from the data cut at rollout.max_new_tokens / completions",
        "share",
        "0",
    ),
    Metric(
        "rollout/hedging",
        "wait, hmm, actually, maybe and perhaps per 100 words (arXiv 2603.24472)",
        "words",
        "steady: losing them goes with worse reasoning elsewhere",
    ),
    Metric("rollout/by_student", "1 if the student sampled this batch of a mixture, 0 if the data set did", "0 or 1"),
    Metric(
        "rollout/staleness", "optimizer steps between sampling and training", "count", "up to rollout.max_staleness"
    ),
    Metric("rollout/servers", "rollout servers that had the weights", "count", "all of them"),
    Metric(
        "rollout/canary_mean",
        "mean |Δ log-probability| of trainer and sampler on the canary",
        "nats",
        "below 1e-3 in float32",
    ),
    Metric("rollout/canary_max", "largest |Δ log-probability| of trainer and sampler on the canary", "nats"),
    Metric("teacher/SLOT_used", "rollouts whose teacher prompt fills this slot / rollouts", "share", "above 0"),
    Metric(
        "teacher/writer_failed",
        "rollouts about which the context's writer failed / rollouts that it was asked about",
        "share",
        "near 0",
    ),
    Metric("teacher/success_groups", "groups with a successful rollout / groups", "share", "above 0"),
    Metric("teacher/KEY", "value of the schedule under this key of the teacher", "as the key", "as scheduled"),
)
EVALUATIONS = (
    Metric("eval/score", "the main score: that of the first suite under its first decoding", "as the reward", "rises"),
    Metric(
        "eval/new_skill", "mean over the task's suites of their main scores; with a panel", "as the rewards", "rises"
    ),
    Metric(
        "eval/retention",
        "mean over the panel's entries of the mean over an entry's suites",
        "as the rewards",
        "steady: a fall is forgetting",
    ),
    Metric("eval/METRIC", "a metric of the objective on the first suite's held-out prompts", "as METRIC", "as METRIC"),
    Metric(
        "eval/SUITE/METRIC", "a metric of the objective on another suite's held-out prompts", "as METRIC", "as METRIC"
    ),
    Metric("eval/SUITE/DECODING/completion_tokens", "mean length of a completion", "tokens", "steady"),
    Metric("eval/SUITE/DECODING/cut_at_limit", "completions cut at the length limit / completions", "share", "near 0"),
    Metric(
        "eval/SUITE/DECODING/entropy",
        "mean of −log S(y) at the sampled tokens y, S as sampled from: an estimate of its entropy; none for greedy decoding",
        "nats per token",
        "falls slowly; near 0, samples no longer differ",
    ),
    Metric(
        "eval/SUITE/DECODING/distinct_1",
        "different tokens / tokens of all completions of a prompt, mean over prompts (arXiv 1510.03055)",
        "share",
        "steady; longer completions have less",
    ),
    Metric(
        "eval/SUITE/DECODING/distinct_2",
        "different pairs of adjacent tokens / pairs of all completions of a prompt, mean over prompts (arXiv 1510.03055)",
        "share",
        "steady; longer completions have less",
    ),
    Metric(
        "eval/SUITE/DECODING/self_repetition",
        "4-grams of tokens that occurred before in the completion / 4-grams (arXiv 1908.04319)",
        "share",
        "near 0",
    ),
    Metric(
        "eval/SUITE/DECODING/within_K",
        "trajectories with a successful turn among the first K / trajectories",
        "share",
        "rises",
    ),
    Metric(
        "eval/SUITE/DECODING/given_failure_K",
        "trajectories that first succeed in turn K / those that had not before",
        "share",
        "rises: else a gain within K turns is that of the first turn",
    ),
    Metric(
        "eval/SUITE/DECODING/turns_to_success",
        "mean turn of the first success, of the trajectories that succeed",
        "turns",
        "falls while within_K does not",
    ),
    Metric(
        "eval/SUITE/DECODING/pass_at_K",
        "mean over prompts of 1 − C(n − c, K) / C(n, K): c of a prompt's n samples reach `pass_score` (arXiv 2107.03374)",
        "share",
        "rises; if only small K do, training sharpens what samples contained already",
    ),
    Metric(
        "eval/SUITE/DECODING/REWARD",
        "mean over prompts of the mean over a prompt's n samples, also known as avg@n",
        "as the reward",
        "rises",
    ),
    Metric(
        "lift/SUITE/DECODING/REWARD",
        "score from the teacher's prompt − score from the student's, before training",
        "as the reward",
        "above 0",
    ),
    Metric(
        "lift/SUITE/DECODING/REWARD/helped",
        "prompts whose score is higher from the teacher's prompt / prompts",
        "share",
        "well above the share that is hurt",
    ),
    Metric(
        "lift/SUITE/DECODING/REWARD/hurt",
        "prompts whose score is lower from the teacher's prompt / prompts",
        "share",
        "near 0",
    ),
)
TIMES = (
    Metric("time/step", "a whole training step", "s"),
    Metric("time/rollout", "sampling, or waiting for servers", "s"),
    Metric("time/sampler", "time that the servers took, with prefetching", "s", "below time/step"),
    Metric("time/sync", "transfer of the weights to the sampler", "s", "small beside time/rollout"),
    Metric("time/judge", "scoring the completions", "s", "small beside time/rollout"),
    Metric("time/writer", "the context's writer", "s", "below time/step"),
    Metric("time/measure", "filters, token statistics and loss masks", "s"),
    Metric("time/teacher", "the teacher's and the reference's forward passes", "s"),
    Metric("time/update", "the student's passes and the optimizer", "s"),
    Metric("time/tokens_per_second", "sampled tokens of this process / time of its sampling", "tokens/s"),
    Metric("time/trained_tokens_per_second", "completion tokens / time of scoring and updates", "tokens/s"),
    Metric("time/teraflops", "operations that scoring and updates need / their time", "10¹² / s"),
    Metric("time/mfu", "time/teraflops / the GPU's published rate in model.dtype", "share", "the higher, the better"),
    Metric("time/evaluation", "a whole evaluation", "s"),
)
CHAPTERS: Mapping[str, tuple[Metric, ...]] = {
    "Steps": STEP,
    "Loss terms": TERM,
    "Rollouts and teachers": ROLLOUTS,
    "Evaluations": EVALUATIONS,
    "Times": TIMES,
}
METRICS = tuple(metric for chapter in CHAPTERS.values() for metric in chapter)

FAMILIES = frozenset(m.name.partition("/")[0] for m in METRICS if "/" in m.name and m.name[0].islower())
"""The first words of metrics whose names have several."""
SINGLE = frozenset(metric.name for metric in METRICS if "/" not in metric.name)

_PLACEHOLDER = re.compile(r"[A-Z]+")
_SEVERAL_WORDS = {"KEY", "METRIC"}
_SCORES = (
    "eval/score",
    "eval/new_skill",
    "eval/retention",
    "eval/SUITE/DECODING/within_K",
    "eval/SUITE/DECODING/pass_at_K",
    "eval/SUITE/DECODING/REWARD",
)


def metric_named(name: str) -> Metric | None:
    """Returns the entry of the table for a metric of a run; None if there is none."""
    return next(
        (m for m in METRICS if (match := _pattern(m).fullmatch(name)) and _are_held_out(*match.groups())), None
    )


def _are_held_out(*names: str) -> bool:
    """Whether these are metrics of the objective, which evaluations compute too; they have no values of schedules."""
    entries = [m for m in (*STEP, *TERM) if not m.name.endswith("/KEY")]
    return all(any(_pattern(m).fullmatch(name) for m in entries) for name in names)


@cache
def _pattern(metric: Metric) -> re.Pattern[str]:
    """A pattern for the names that an entry stands for; its group, if there is one, is another metric's name."""

    def replace(placeholder: re.Match[str]) -> str:
        word = placeholder[0]
        text = ".+" if word in _SEVERAL_WORDS else "[^/]+"
        text = f"({text})" if word == "METRIC" else text
        return rf"(?!(?:{'|'.join(sorted(FAMILIES))})/){text}" if word == "TERM" else text

    ends = f"(?:{'|'.join(INTERVAL_SUFFIXES)})?" if metric.name in _SCORES else ""
    return re.compile(_PLACEHOLDER.sub(replace, metric.name) + ends)
