"""What makes a method: who samples, what the teacher is and sees, which losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from attrs import frozen

from sdkit.specs.divergences import Divergence, FileDivergence
from sdkit.specs.fields import (
    AT_LEAST_ONE,
    INSIDE_SHARE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    TOP_P,
    Table,
    spec_field,
)
from sdkit.specs.losses import LossTerm
from sdkit.specs.teachers import ExternalWeights, OneTeacher, RoutedWeights, TeacherWeights
from sdkit.specs.token_weights import RouteSpec

# ── rollouts ──────────────────────────────────────────────────────────────────────────────────


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
    """The completions stand in the data set."""

    kind: ClassVar[str] = "dataset"
    column: str = spec_field("which column holds the completion", default="demonstration")


SampledBy = StudentSamples | TeacherSamples | DatasetSamples


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
class VllmBackend:
    """vLLM in the trainer's process."""

    kind: ClassVar[str] = "vllm"
    dtype: Literal["float32", "bfloat16"] | None = spec_field(
        "precision of the engine (default: the model's)", default=None
    )
    max_rows: int = spec_field("sequences decoded at once", default=64, range=AT_LEAST_ONE)
    cache_gib: float = spec_field("key-value cache on CPU, GiB", default=1.0, range=POSITIVE)
    gpu_share: float = spec_field(
        "share of GPU memory for the engine", default=0.4, range=INSIDE_SHARE
    )
    canary_bound: float | None = spec_field(
        "largest mean difference of log-probabilities after a weight sync (default: 1e-3 in float32, 0.25 in bfloat16)",
        default=None,
        range=POSITIVE,
    )


@frozen(kw_only=True)
class ReplayBackend:
    """The recorded rollouts of an earlier run; no sampling."""

    kind: ClassVar[str] = "replay"
    run: str = spec_field("run directory, relative to the spec", range=NOT_EMPTY)


Backend = AutoBackend | TransformersBackend | VllmBackend | ReplayBackend


@frozen(kw_only=True)
class RolloutSpec:
    """Who samples, how, and on which engine."""

    sampled_by: SampledBy = spec_field("who samples", default=StudentSamples())
    completions_per_prompt: int = spec_field("size of a group", default=1, range=AT_LEAST_ONE)
    temperature: float = spec_field("sampling temperature", default=1.0, range=POSITIVE)
    top_p: float = spec_field("nucleus sampling", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "keep the k likeliest tokens; 0 keeps all", default=0, range=NOT_NEGATIVE
    )
    max_new_tokens: int = spec_field("longest completion, tokens", default=256, range=AT_LEAST_ONE)
    max_prompt_tokens: int | None = spec_field(
        "longest student prompt, tokens; a longer one is an error", default=None, range=AT_LEAST_ONE
    )
    stop: tuple[str, ...] = spec_field("texts that end a completion", default=())
    backend: Backend = spec_field("what generates", default=AutoBackend())


# ── teacher ───────────────────────────────────────────────────────────────────────────────────


WRAP_HELP = (
    "text around the value, which stands in it as {value}; nothing at all where there is none"
)


@frozen(kw_only=True)
class ColumnSlot:
    """A column of the row."""

    kind: ClassVar[str] = "column"
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=NOT_EMPTY)
    name: str = spec_field("sdkit's name of the column", range=NOT_EMPTY)


@frozen(kw_only=True)
class TextSlot:
    """The same text for every row."""

    kind: ClassVar[str] = "text"
    text: str = spec_field("the text", range=NOT_EMPTY)


@frozen(kw_only=True)
class SuccessfulSibling:
    """Another rollout's completion of the same prompt, where one was rewarded well enough."""

    kind: ClassVar[str] = "successful_sibling"
    threshold: float = spec_field("smallest reward that is a success", default=1.0)
    pick: Literal["first", "best", "random"] = spec_field(
        "which success, where there are several", default="first"
    )
    exclude_self: bool = spec_field("a rollout never sees its own completion", default=True)
    strip_thinking: bool = spec_field("leave out <think>…</think>", default=True)
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=NOT_EMPTY)


@frozen(kw_only=True)
class Feedback:
    """What the reward said of this rollout's own completion."""

    kind: ClassVar[str] = "feedback"
    when: Literal["always", "no_solution"] = spec_field(
        "always, or only where no successful sibling is shown", default="always"
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=NOT_EMPTY)


@frozen(kw_only=True)
class OwnAttempt:
    """This rollout's own completion."""

    kind: ClassVar[str] = "own_attempt"
    strip_thinking: bool = spec_field("leave out <think>…</think>", default=True)
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=NOT_EMPTY)


Slot = ColumnSlot | TextSlot | SuccessfulSibling | Feedback | OwnAttempt
OfRollouts = SuccessfulSibling | Feedback | OwnAttempt
"""Slots that can be filled only once a group has been sampled and judged."""


@frozen(kw_only=True)
class Turn:
    """One exchange: what the user says and what the assistant answers."""

    user: str = spec_field("template of the user's message", range=NOT_EMPTY)
    assistant: str = spec_field("template of the answer", range=NOT_EMPTY)


@frozen(kw_only=True)
class Context:
    """What every kind of teacher context has."""

    slots: Table[Slot] = spec_field("what fills the template", default=Table())
    requires: Literal["all", "any"] = spec_field(
        "which slots must be filled, or else the row has no teacher", default="all"
    )
    max_prompt_tokens: int | None = spec_field(
        "longest teacher prompt; longer context is cut", default=None, range=AT_LEAST_ONE
    )
    cut: Literal["start", "end"] = spec_field(
        "the end of the context that a cut removes; the prompt always stays whole", default="end"
    )


@frozen(kw_only=True)
class UserTurn(Context):
    """The template takes the place of the last user message."""

    kind: ClassVar[str] = "user_turn"
    template: str = spec_field("text with {prompt} and the slots", range=NOT_EMPTY)


@frozen(kw_only=True)
class SystemMessage(Context):
    """The template becomes the system message (after the row's own, where it has one)."""

    kind: ClassVar[str] = "system_message"
    template: str = spec_field("text with the slots", range=NOT_EMPTY)


@frozen(kw_only=True)
class EarlierTurns(Context):
    """Exchanges that stand before the prompt, as if the chat had begun with them."""

    kind: ClassVar[str] = "earlier_turns"
    turns: tuple[Turn, ...] = spec_field("the exchanges, first to last", range=NOT_EMPTY)


Sees = UserTurn | SystemMessage | EarlierTurns


@frozen(kw_only=True)
class TeacherSpec:
    """What the teacher is (weights) and what it sees (context)."""

    weights: TeacherWeights = spec_field("which weights")
    sees: Sees | None = spec_field(
        "extra context; without it the teacher sees the student's prompt", default=None
    )


@frozen(kw_only=True)
class MethodSpec:
    """A method page: the questions that make a method, and nothing of the run."""

    rollout: RolloutSpec = spec_field("who samples, and how", default=RolloutSpec())
    teacher: TeacherSpec | None = spec_field("what the teacher is and sees", default=None)
    losses: Table[LossTerm] = spec_field("named terms of the objective", range=NOT_EMPTY)
    route: RouteSpec | None = spec_field(
        "which terms count a rollout, by its outcome (default: all)", default=None
    )


def teachers_of(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], OneTeacher]]:
    """Each set of weights that teaches, with its key; in the order of the routes."""
    weights = spec.teacher and spec.teacher.weights
    if isinstance(weights, RoutedWeights):
        for name, one in weights.routes.items():
            yield ("teacher", "weights", "routes", name), one
    elif weights:
        yield ("teacher", "weights"), weights


def external_teachers(spec: MethodSpec) -> Iterator[tuple[tuple[str, ...], ExternalWeights]]:
    """The other models that teach, each with its key."""
    for path, weights in teachers_of(spec):
        if isinstance(weights, ExternalWeights):
            yield path, weights


DEFAULT_KIND: dict[Any, type] = {Sees: UserTurn, Divergence: FileDivergence}
"""Unions whose `kind` may be left out, and what it then is."""
