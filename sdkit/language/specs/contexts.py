"""What the teacher sees that the student does not."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    NAME,
    NOT_EMPTY,
    SIGNED,
    TEXT,
    Table,
    spec_field,
)

WRAP_HELP = (
    "text around the value, which stands in it as {value}; nothing at all where there is none"
)


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
    """Another rollout's completion of the same prompt, where one was rewarded well enough."""

    kind: ClassVar[str] = "successful_sibling"
    threshold: float = spec_field("smallest reward that is a success", default=1.0, range=SIGNED)
    pick: Literal["first", "best", "random"] = spec_field(
        "which success, where there are several", default="first"
    )
    exclude_self: bool = spec_field("a rollout never sees its own completion", default=True)
    strip_thinking: bool = spec_field(
        "leave out the thinking, `<think>…</think>` or what the model writes instead", default=True
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class Feedback:
    """What the reward said of this rollout's own completion."""

    kind: ClassVar[str] = "feedback"
    when: Literal["always", "no_solution"] = spec_field(
        "always, or only where no successful sibling is shown", default="always"
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class OwnAttempt:
    """This rollout's own completion."""

    kind: ClassVar[str] = "own_attempt"
    strip_thinking: bool = spec_field(
        "leave out the thinking, `<think>…</think>` or what the model writes instead", default=True
    )
    wrap: str = spec_field(WRAP_HELP, default="{value}", range=TEXT)


@frozen(kw_only=True)
class Verdict:
    """One of two texts, by this rollout's own reward."""

    kind: ClassVar[str] = "verdict"
    threshold: float = spec_field("smallest reward that is a success", default=1.0, range=SIGNED)
    success: str = spec_field("the text after a success", range=TEXT)
    failure: str = spec_field("the text after a failure", range=TEXT)


Slot = ColumnSlot | TextSlot | SuccessfulSibling | Feedback | OwnAttempt | Verdict
OfRollouts = SuccessfulSibling | Feedback | OwnAttempt | Verdict
"""Slots that can be filled only once a group has been sampled and judged."""
Wording = TextSlot | Verdict
"""Slots whose text stands in the spec: always filled, never cut."""


@frozen(kw_only=True)
class Turn:
    """One exchange: what the user says and what the assistant answers."""

    user: str = spec_field("template of the user's message", range=TEXT)
    assistant: str = spec_field("template of the answer", range=TEXT)


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
    template: str = spec_field("text with {prompt} and the slots", range=TEXT)


@frozen(kw_only=True)
class SystemMessage(Context):
    """The template becomes the system message (after the row's own, where it has one)."""

    kind: ClassVar[str] = "system_message"
    template: str = spec_field("text with the slots", range=TEXT)


@frozen(kw_only=True)
class EarlierTurns(Context):
    """Exchanges that stand before the prompt, as if the chat had begun with them."""

    kind: ClassVar[str] = "earlier_turns"
    turns: tuple[Turn, ...] = spec_field("the exchanges, first to last", range=NOT_EMPTY)


@frozen(kw_only=True)
class AnswerStart(Context):
    """The template stands where the answer begins; the completion that is scored follows it."""

    kind: ClassVar[str] = "answer_start"
    template: str = spec_field("text with the slots", range=TEXT)


Sees = UserTurn | SystemMessage | EarlierTurns | AnswerStart


DEFAULT_KIND: dict[Any, type] = {Sees: UserTurn}
"""Unions whose `kind` may be left out, and what it then is."""
