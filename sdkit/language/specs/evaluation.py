"""Evaluation during a run: the task's suites, and a panel of what training must not lose."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from sdkit.language.specs.fields import AT_LEAST_ONE, NAME, NOT_EMPTY, NOT_NEGATIVE_COUNT, Table, spec_field
from sdkit.language.specs.scores import Decoding, HeldOutPrompts, Suite

GREEDY: Table[Decoding] = Table({"greedy": Decoding(temperature=0.0)})


@frozen(kw_only=True)
class PackagedSuites:
    """The keys of suites that come with sdkit."""

    size: int = spec_field("prompts of each suite", default=50, range=AT_LEAST_ONE)
    decoding: Table[Decoding] = spec_field("sampling settings, by name", default=GREEDY, range=NOT_EMPTY)
    max_new_tokens: int = spec_field("longest completion, tokens", default=256, range=AT_LEAST_ONE)


@frozen(kw_only=True)
class InstructionSuite(PackagedSuites):
    """Instructions on format, length, keywords, letters and language; programs check whether answers follow them."""

    kind: ClassVar[str] = "instructions"
    size: int = spec_field("number of prompts, from the start; there are 103", default=103, range=AT_LEAST_ONE)

    def describe(self) -> str:
        """Returns the line that `sdkit plan` shows."""
        return f"instructions: {self.size} prompts, {self.max_new_tokens} tokens"


@frozen(kw_only=True)
class ReasoningSuites(PackagedSuites):
    """Six tasks of reasoning-gym, a suite each, at easy settings; needs the package reasoning-gym."""

    kind: ClassVar[str] = "reasoning"

    def describe(self) -> str:
        """Returns the line that `sdkit plan` shows."""
        return f"reasoning: six tasks of {self.size} prompts, {self.max_new_tokens} tokens"


@frozen(kw_only=True)
class LmEvalTasks:
    """Tasks of EleutherAI's lm-eval, a suite each; needs the package lm-eval.  transformers runs the model."""

    kind: ClassVar[str] = "lm_eval"
    name: str = spec_field("the entry's name in tables", default="lm_eval", range=NAME)
    tasks: tuple[str, ...] = spec_field("names of tasks or groups", range=NOT_EMPTY, each=NAME)
    folder: str | None = spec_field(
        "folder with task files of your own, relative to the spec (default: lm-eval's tasks only)",
        default=None,
        path_to="file",
    )
    limit: int | None = spec_field("use only this many documents of each task", default=None, range=AT_LEAST_ONE)
    num_fewshot: int | None = spec_field(
        "solved examples before each document (default: the task's own)", default=None, range=NOT_NEGATIVE_COUNT
    )
    chat_template: bool = spec_field("ask within the model's chat template", default=False)
    batch_size: int = spec_field("sequences in a forward pass", default=8, range=AT_LEAST_ONE)

    def describe(self) -> str:
        """Returns the line that `sdkit plan` shows."""
        limit = f", {self.limit} documents of each" if self.limit else ""
        return f"{self.name}: lm-eval's {', '.join(self.tasks)}{limit}, with transformers"


@frozen(kw_only=True)
class PanelSuite(HeldOutPrompts):
    """A suite of your own rows and rewards."""

    kind: ClassVar[str] = "suite"
    name: str = spec_field("the suite's name", range=NAME)

    def describe(self) -> str:
        """Returns the line that `sdkit plan` shows."""
        return f"{self.name}: scored by {self.score}"


PanelEntry = InstructionSuite | ReasoningSuites | LmEvalTasks | PanelSuite


def entry_name(entry: PanelEntry) -> str:
    """The name of an entry of the panel: the one that it states, or its kind."""
    return entry.name if isinstance(entry, LmEvalTasks | PanelSuite) else entry.kind


@frozen(kw_only=True)
class EvaluationSpec:
    """Evaluation on held-out prompts."""

    suites: Table[Suite] = spec_field("sets of held-out prompts, by name; the first is the headline", range=NOT_EMPTY)
    every: int | None = spec_field(
        "steps between evaluations; the run's start and end are always evaluated", default=None, range=AT_LEAST_ONE
    )
    teacher_lift: int = spec_field(
        "number of held-out prompts on which the score with the teacher's context is measured before training; 0 skips it",
        default=100,
        range=NOT_NEGATIVE_COUNT,
    )
    panel: tuple[PanelEntry, ...] = spec_field(
        "suites that measure what training must not lose; `[instructions, reasoning]` come with sdkit (default: none)",
        default=(),
    )
    panel_every: int | None = spec_field(
        "steps between evaluations of the panel, a multiple of `every` (default: only the start and the end)",
        default=None,
        range=AT_LEAST_ONE,
    )
