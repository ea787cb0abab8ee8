"""Lists the keys of a spec that may change when a run is resumed or its rollouts are replayed.  Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdkit.language.errors import Path as SpecPath

_OUTPUT_AND_LIMITS: Sequence[SpecPath] = (
    ("output",),
    ("training", "deadline_seconds"),
    ("training", "micro_batch_tokens"),
    ("training", "chunk_tokens"),
    ("training", "reduce_bucket_size"),
    ("training", "allgather_bucket_size"),
    ("training", "deterministic"),
)
"""What a run writes, how long ranks wait, and how much memory a pass takes: these may change on resume and on replay."""

WRITER_CONNECTION: Sequence[SpecPath] = tuple(
    ("teacher", "sees", "writer", key)
    for key in (
        "url",
        "key_from",
        "allow_remote",
        "requests_at_once",
        "request_seconds",
        "retries",
        "deadline_seconds",
        "max_failed_share",
    )
)
"""How the writer of a teacher's context is reached, and when it has failed; not what it is asked."""

CHANGEABLE_ON_RESUME: Sequence[SpecPath] = (
    *_OUTPUT_AND_LIMITS,
    *(("rollout", "backend", key) for key in ("urls", "key_from", "allow_remote", "folder", "deadline_seconds")),
    *WRITER_CONNECTION,
    ("training", "steps"),
    ("training", "epochs"),
    ("model", "activation_checkpointing"),
)
"""Keys that may change on resume, with all keys below them: the run's length and output, its time limit and memory settings,
and how its servers for rollouts and written contexts are reached."""

CHANGEABLE_ON_REPLAY: Sequence[SpecPath] = (
    *_OUTPUT_AND_LIMITS,
    *((key,) for key in ("losses", "teacher", "route", "rewards", "reward")),
    *((key,) for key in ("optimizer", "evaluation", "machine")),
    ("data", "columns"),
    ("rollout", "keep"),
    ("training", "updates_per_rollout"),
    ("training", "share_prompts"),
    ("training", "zero_stage"),
    ("training", "reduce_dtype"),
)
"""Keys that may differ from the recorded run, with all keys below them: none of them changes a prompt or a token."""

_LENGTH = "the learning rate may follow the run's length; --steps ends a replay early"
FIXED_ON_REPLAY: Mapping[SpecPath, str] = {
    ("model",): "this model sampled the recording",
    ("rollout",): "the completions are the recording's",
    ("data", "columns", "prompt"): "the prompts are the recording's",
    ("data", "columns", "system"): "the prompts are the recording's",
    ("data",): "the prompts are the recording's",
    ("training", "steps"): _LENGTH,
    ("training", "epochs"): _LENGTH,
    ("training",): "the recording's prompts and seeds follow from it",
}
"""Why the other keys may not differ; the entry with the longest matching prefix applies."""

OPTIMIZER_STATE_KEYS: Sequence[SpecPath] = (
    ("optimizer", "betas"),
    ("optimizer", "eps"),
    ("optimizer", "weight_decay"),
    ("optimizer", "decay"),
    ("training", "zero_stage"),
)
"""Keys that a checkpoint's optimizer state depends on: they may differ only in a replay from the start model."""


def starts_with(path: SpecPath, prefix: SpecPath) -> bool:
    """Whether `path` is the key `prefix` or lies below it."""
    return path[: len(prefix)] == prefix


def may_change_on_resume(path: SpecPath) -> bool:
    """Whether `path` may have another value when the run is resumed."""
    return any(starts_with(path, key) for key in CHANGEABLE_ON_RESUME)


def reason_fixed_on_replay(path: SpecPath) -> str | None:
    """Why `path` may not differ from the recorded run; None if it may."""
    matching = [key for key in (*CHANGEABLE_ON_REPLAY, *FIXED_ON_REPLAY) if starts_with(path, key)]
    longest = max(matching, key=len, default=())
    if longest in CHANGEABLE_ON_REPLAY:
        return None
    return FIXED_ON_REPLAY.get(longest, "a replay keeps it")
