"""The teacher's context: what it sees beyond the student's prompt."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    GREEDY_OR_TEMPERATURE,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE_COUNT,
    ONE_OR_ALL,
    SECONDS,
    SHARE,
    SIGNED,
    TEXT,
    Component,
    Table,
    spec_field,
)

WRAP_HELP = "text around the value, with {value} in its place; an empty slot stays empty"


@frozen(kw_only=True)
class ColumnSlot:
    """A column of the row."""

    kind: ClassVar[str] = "column"
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)
    name: str = spec_field("sdkit's name of the column", range=NAME)


@frozen(kw_only=True)
class TextSlot:
    """The same text for every row."""

    kind: ClassVar[str] = "text"
    text: str = spec_field("the text", range=TEXT)


@frozen(kw_only=True)
class SuccessfulSibling:
    """Another rollout's completion of the same prompt, if its reward reaches the threshold."""

    kind: ClassVar[str] = "successful_sibling"
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)
    pick: Literal["first", "best", "random"] = spec_field(
        "which success to show if there are several", default="first"
    )
    exclude_self: bool = spec_field("whether a rollout's own completion is never shown to its teacher", default=True)
    strip_thinking: bool = spec_field(
        "remove the reasoning block: `<think>…</think>` or the model's own markers", default=True
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class Feedback:
    """The reward's feedback text on this rollout's own completion, or the environment's on each of its turns."""

    kind: ClassVar[str] = "feedback"
    of: Literal["trajectory", "turn"] = spec_field(
        "`trajectory`: the training reward's on the last turn; `turn`: the environment's on the very turn that the teacher "
        "scores, which takes one teacher row a turn",
        default="trajectory",
    )
    when: Literal["always", "no_solution"] = spec_field(
        "always, or only if no successful sibling is shown", default="always"
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class OwnAttempt:
    """This rollout's own completion."""

    kind: ClassVar[str] = "own_attempt"
    strip_thinking: bool = spec_field(
        "remove the reasoning block: `<think>…</think>` or the model's own markers", default=True
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class Verdict:
    """One of two texts, chosen by this rollout's own reward."""

    kind: ClassVar[str] = "verdict"
    threshold: float = spec_field("smallest reward that counts as a success", default=1.0, range=SIGNED)
    success: str = spec_field("the text after a success", range=TEXT)
    failure: str = spec_field("the text after a failure", range=TEXT)


@frozen(kw_only=True)
class NextTurns:
    """Hindsight: what the environment said after the turn that the teacher scores; takes one teacher row a turn."""

    kind: ClassVar[str] = "next_turns"
    how_many: int | str = spec_field(
        "observations to show: 1 is the one that followed the turn, 2 the next one too, `all` those of the trajectory's "
        "rest; also the one after the last turn, which nothing answers",
        default=1,
        range=ONE_OR_ALL,
    )
    roles: tuple[Literal["user", "tool"], ...] = spec_field(
        "roles of the messages to show", default=("user", "tool"), range=NOT_EMPTY
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)

    def shown(self, turns: int) -> int:
        """The number of observations shown of a trajectory of `turns` turns, at most."""
        return turns if self.how_many == "all" else min(int(self.how_many), turns)


@frozen(kw_only=True)
class Written:
    """What the context's `writer` wrote about this rollout; empty if it failed."""

    kind: ClassVar[str] = "written"
    key: str | None = spec_field(
        "key of the text in the JSON object that the writer answers with (default: all of the answer is the text)",
        default=None,
        range=NAME,
    )
    of: Literal["trajectory", "turn"] = spec_field(
        "`turn`: at the key is an object with the texts of single turns, by number from 1, and another turn's slot is "
        "empty; takes one teacher row a turn",
        default="trajectory",
    )
    unless: str | None = spec_field("another slot: shown only where that one is empty", default=None, range=NAME)
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


WriterSlot = ColumnSlot | TextSlot | SuccessfulSibling | Feedback | OwnAttempt | Verdict
"""Slots of the question to a writer."""


@frozen(kw_only=True)
class Writer:
    """A model behind an OpenAI-compatible chat API, asked about each rollout once it has been scored."""

    url: str = spec_field(
        "address of the server; sdkit adds /v1/chat/completions", default="http://127.0.0.1:8000", range=NAME
    )
    model: str = spec_field("name under which the server serves the model", range=NAME)
    prompt: str = spec_field(
        "the question: text with {prompt}, {trajectory} (all turns and what the environment said) and the writer's slots",
        range=TEXT,
    )
    slots: Table[WriterSlot] = spec_field("values for the question's other fields", default=Table())
    temperature: float = spec_field("sampling temperature; 0 is greedy", default=1.0, range=GREEDY_OR_TEMPERATURE)
    max_new_tokens: int = spec_field("longest answer, in the writer's tokens", default=1024, range=AT_LEAST_ONE)
    attempts: int = spec_field(
        "how often it is asked until its answer has what the slots take; it is told what was missing",
        default=2,
        range=AT_LEAST_ONE,
    )
    max_failed_share: float = spec_field(
        "share of a batch's rollouts about which the writer may fail before the run ends", default=0.5, range=SHARE
    )
    key_from: str | None = spec_field(
        "environment variable with the server's API key; the key itself is never in a spec", default=None, range=NAME
    )
    allow_remote: bool = spec_field(
        "allow a server on another machine, which receives prompts and completions", default=False
    )
    requests_at_once: int = spec_field("concurrent requests of each rank", default=8, range=AT_LEAST_ONE)
    request_seconds: float = spec_field("time limit of one request", default=120.0, range=SECONDS)
    retries: int = spec_field("retries if the server is unreachable or busy", default=4, range=NOT_NEGATIVE_COUNT)
    deadline_seconds: float = spec_field(
        "time limit of all answers about a rank's batch; what is late has failed", default=300.0, range=SECONDS
    )


Slot = ColumnSlot | TextSlot | SuccessfulSibling | Feedback | OwnAttempt | Verdict | NextTurns | Written
OfRollouts = SuccessfulSibling | Feedback | OwnAttempt | Verdict | NextTurns | Written
"""Slots that are filled after the group has been sampled and scored."""
Wording = TextSlot | Verdict
"""Slots whose text is in the spec: always filled, never cut."""


def is_by_turn(slot: Slot) -> bool:
    """Whether the slot has another text for each turn of a trajectory."""
    return isinstance(slot, NextTurns) or (isinstance(slot, Feedback | Written) and slot.of == "turn")


@frozen(kw_only=True)
class Turn:
    """One exchange: a user message and the assistant's answer."""

    user: str = spec_field("template of the user's message", range=TEXT)
    assistant: str = spec_field("template of the answer", range=TEXT)


@frozen(kw_only=True)
class Context(Component):
    """The keys shared by all kinds of teacher context."""

    slots: Table[Slot] = spec_field("values for the template's fields", default=Table())
    writer: Writer | None = spec_field("what writes the slots of kind `written`", default=None)
    requires: Literal["all", "any"] = spec_field(
        "whether all slots or any one must be filled; otherwise the rollout has no teacher prompt", default="all"
    )
    max_prompt_tokens: int | None = spec_field(
        "longest teacher prompt, tokens, without the turns before the one it is for; longer context is cut",
        default=None,
        range=AT_LEAST_ONE,
    )
    cut: Literal["start", "end"] = spec_field(
        "which end of the context a cut removes; the prompt is never cut", default="end"
    )

    @property
    def by_turn(self) -> bool:
        """Whether the teacher has a prompt of its own for each turn of a trajectory."""
        return any(map(is_by_turn, self.slots.values()))

    def describe(self) -> str:
        by_turn = ", for each turn" if self.by_turn else ""
        by_writer = f", as {self.writer.model} writes it" if self.writer else ""
        return f"{', '.join(self.slots) or 'fixed text'} {self.description.format(self)}{by_turn}{by_writer}"


@frozen(kw_only=True)
class MovingContext(Context):
    """A context that can stand at each turn of a trajectory."""

    every_turn: bool = spec_field(
        "whether the template stands at every turn of a trajectory, not only at the first; this takes one teacher row a turn, "
        "and slots that differ by turn ask for it by themselves",
        default=False,
    )

    @property
    def by_turn(self) -> bool:
        return self.every_turn or super().by_turn


@frozen(kw_only=True)
class UserTurn(MovingContext):
    """The template replaces the last user message: of the prompt, or with `every_turn` the last one before the turn."""

    kind: ClassVar[str] = "user_turn"
    description: ClassVar[str] = "in the user turn"
    template: str = spec_field("text with {prompt} and the slots", range=TEXT)


@frozen(kw_only=True)
class SystemMessage(Context):
    """The template becomes the system message, after the row's own if it has one."""

    kind: ClassVar[str] = "system_message"
    description: ClassVar[str] = "in the system message"
    template: str = spec_field("text with the slots", range=TEXT)


@frozen(kw_only=True)
class EarlierTurns(Context):
    """Exchanges placed before the prompt, as earlier turns of the chat."""

    kind: ClassVar[str] = "earlier_turns"
    description: ClassVar[str] = "as {0.exchanges}"
    turns: tuple[Turn, ...] = spec_field("the exchanges, first to last", range=NOT_EMPTY)

    @property
    def exchanges(self) -> str:
        """The number of exchanges in words."""
        return f"{len(self.turns)} earlier turn{'s' * (len(self.turns) != 1)}"


@frozen(kw_only=True)
class AnswerStart(MovingContext):
    """The template begins the assistant's answer, with `every_turn` that of each turn; what was sampled follows it."""

    kind: ClassVar[str] = "answer_start"
    description: ClassVar[str] = "at the start of the answer"
    template: str = spec_field("text with the slots", range=TEXT)


Sees = UserTurn | SystemMessage | EarlierTurns | AnswerStart


DEFAULT_KIND: dict[Any, type] = {Sees: UserTurn}
"""Unions whose `kind` may be left out, with the kind assumed."""
