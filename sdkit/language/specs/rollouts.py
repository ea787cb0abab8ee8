"""Who samples, how, and which of the samples are trained on."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    GIBIBYTES,
    INSIDE_SHARE,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE_COUNT,
    PATH,
    POSITIVE,
    SECONDS,
    SHARE,
    SIGNED,
    SOME_TEXT,
    TEMPERATURE,
    TOP_P,
    Schedule,
    spec_field,
)


@frozen(kw_only=True)
class StudentSamples:
    """The student answers its own prompt."""

    kind: ClassVar[str] = "student"


@frozen(kw_only=True)
class TeacherSamples:
    """The teacher's weights, its prompt, or both, do the sampling."""

    kind: ClassVar[str] = "teacher"
    weights: Literal["student", "teacher"] = spec_field("whose weights sample", default="teacher")
    prompt: Literal["student", "teacher"] = spec_field("whose prompt they see", default="teacher")


@frozen(kw_only=True)
class DatasetSamples:
    """The completions stand in the data set; each ends with the token that ends a turn of the chat template."""

    kind: ClassVar[str] = "dataset"
    column: str = spec_field(
        "which column holds the completion", default="demonstration", range=NAME
    )
    drawn_by: Literal["other", "student"] = spec_field(
        "whether they are a log of the student's own answers, so that estimates may be made from them",
        default="other",
    )


@frozen(kw_only=True)
class MixtureSamples:
    """By the toss of a coin the student answers a whole rollout batch, or the data set does."""

    kind: ClassVar[str] = "mixture"
    student_share: float | Schedule = spec_field(
        "share of the rollout batches that the student answers", range=SHARE
    )
    column: str = spec_field(
        "which column holds the completion", default="demonstration", range=NAME
    )


SampledBy = StudentSamples | TeacherSamples | DatasetSamples | MixtureSamples


def drawn_by_student(by: SampledBy) -> bool:
    """Whether every completion was drawn from the student's own distribution."""
    return isinstance(by, StudentSamples) or (
        isinstance(by, DatasetSamples) and by.drawn_by == "student"
    )


def completion_column(by: SampledBy) -> str | None:
    """The column that holds completions, where some come from the data set."""
    return by.column if isinstance(by, DatasetSamples | MixtureSamples) else None


# ── which rollouts are trained on ─────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class NonEmpty:
    """Completions that say something: not white space alone."""

    kind: ClassVar[str] = "non_empty"


@frozen(kw_only=True)
class RewardAtLeast:
    """Rollouts that were rewarded well enough."""

    kind: ClassVar[str] = "reward_at_least"
    threshold: float = spec_field("smallest reward that is kept", default=1.0, range=SIGNED)


@frozen(kw_only=True)
class NonConstantGroup:
    """Groups whose rewards are not all the same."""

    kind: ClassVar[str] = "non_constant_group"


Keep = NonEmpty | RewardAtLeast | NonConstantGroup


@frozen(kw_only=True)
class AutoBackend:
    """vLLM where it is installed, transformers elsewhere; `sdkit plan` says which and why."""

    kind: ClassVar[str] = "auto"


@frozen(kw_only=True)
class TransformersBackend:
    """`generate` on the training weights."""

    kind: ClassVar[str] = "transformers"
    batch_rows: int = spec_field("rows generated at once", default=64, range=AT_LEAST_ONE)


@frozen(kw_only=True)
class VllmEngine:
    """What vLLM is started with, in whichever process."""

    dtype: Literal["float32", "bfloat16"] | None = spec_field(
        "precision of the engine (default: the model's)", default=None
    )
    max_rows: int = spec_field("sequences decoded at once", default=64, range=AT_LEAST_ONE)
    cache_gib: float = spec_field("key-value cache on CPU, GiB", default=1.0, range=GIBIBYTES)
    gpu_share: float = spec_field(
        "share of GPU memory for the engine", default=0.4, range=INSIDE_SHARE
    )
    canary_bound: float | None = spec_field(
        "largest mean difference of log-probabilities after a weight sync (default: 1e-3 in float32, 0.25 in bfloat16)",
        default=None,
        range=POSITIVE,
    )


@frozen(kw_only=True)
class VllmBackend(VllmEngine):
    """vLLM in the trainer's process."""

    kind: ClassVar[str] = "vllm"


@frozen(kw_only=True)
class VllmServerBackend(VllmEngine):
    """vLLM in servers of its own, one or several, here or on other machines; `sdkit serve` starts one that matches.

    Weights go by file, in a folder that the trainer and every server see.
    """

    kind: ClassVar[str] = "vllm_server"
    urls: tuple[str, ...] = spec_field(
        "where the servers listen; groups are dealt out to them",
        default=("http://127.0.0.1:8000",),
        range=NOT_EMPTY,
        each=NAME,
    )
    key_from: str | None = spec_field(
        "environment variable that holds the servers' key; the key itself stands in no spec",
        default=None,
        range=NAME,
    )
    allow_remote: bool = spec_field(
        "let a server be another machine: prompts are sent there, and it takes the weights",
        default=False,
    )
    folder: str | None = spec_field(
        "where weight files pass from the trainer to the servers, relative to the spec (default: weights/ in sdkit's "
        "cache folder, for servers on this machine)",
        default=None,
        range=PATH,
    )
    deadline_seconds: float = spec_field(
        "longest time for one completion or one weight transfer, further attempts included: so long a lone server may "
        "be away",
        default=600.0,
        range=SECONDS,
    )


@frozen(kw_only=True)
class ReplayBackend:
    """The recorded rollouts of an earlier run; no sampling."""

    kind: ClassVar[str] = "replay"
    run: str = spec_field("run directory, relative to the spec", range=PATH)


Backend = AutoBackend | TransformersBackend | VllmBackend | VllmServerBackend | ReplayBackend


@frozen(kw_only=True)
class RolloutSpec:
    """Who samples, how, and on which engine."""

    sampled_by: SampledBy = spec_field("who samples", default=StudentSamples())
    completions_per_prompt: int = spec_field("size of a group", default=1, range=AT_LEAST_ONE)
    temperature: float = spec_field("sampling temperature", default=1.0, range=TEMPERATURE)
    top_p: float = spec_field("nucleus sampling", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "keep the k likeliest tokens; 0 keeps all", default=0, range=NOT_NEGATIVE_COUNT
    )
    max_new_tokens: int = spec_field("longest completion, tokens", default=256, range=AT_LEAST_ONE)
    max_prompt_tokens: int | None = spec_field(
        "longest student prompt, tokens; a longer one is an error", default=None, range=AT_LEAST_ONE
    )
    stop: tuple[str, ...] = spec_field("texts that end a completion", default=(), each=SOME_TEXT)
    keep: tuple[Keep, ...] = spec_field(
        "which rollouts are trained on: those that pass every filter (default: all)", default=()
    )
    backend: Backend = spec_field("what generates", default=AutoBackend())
    max_staleness: int = spec_field(
        "rollout batches between the weights that sample and those that are trained: above 0 servers sample the next "
        "batches while this one trains",
        default=0,
        range=NOT_NEGATIVE_COUNT,
    )
