"""The packaged method pages: what each is, where it is published, and what it needs from a run file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from attrs import frozen

from sdkit.language.errors import UnreadableInput, did_you_mean, listed, shorten
from sdkit.language.load import load_spec
from sdkit.language.overlay import packaged_methods, packaged_page
from sdkit.language.rules.rollouts import reward_users
from sdkit.language.specs import ColumnSlot, ExternalWeights, Feedback, MethodSpec, RoutedWeights

_SENTENCE_END = re.compile(r'\.\s+(?=[A-Z"]|arXiv)')
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_AUTHORS_AND_YEAR = re.compile(r"\b[A-Z]\w+(?: et al\.)? (?:19|20)\d\d\b")


@frozen(kw_only=True)
class MethodPage:
    """A packaged method page, as `sdkit methods` lists it."""

    name: str
    summary: str  # the first sentence of the page's comment
    comment: str  # the comment that the page begins with
    paper: str  # arXiv id, else authors and year; empty if the page cites none
    spec: MethodSpec

    @property
    def needs(self) -> tuple[str, ...]:
        """What a run file must add besides model, prompts, optimizer and length."""
        return tuple(_needs(self.spec))


@cache
def method_page(name: str) -> MethodPage:
    """Returns a packaged method page.  Raises UnreadableInput, with the closest name, if there is none."""
    if name not in packaged_methods():
        hint = did_you_mean(name, packaged_methods()) or "`sdkit methods` lists them"
        raise UnreadableInput(f"there is no packaged method {shorten(name)}", hint=hint)
    path = packaged_page(name)
    spec = load_spec(path).spec
    if spec is None:
        raise UnreadableInput(f"{path} has errors", hint=f"`sdkit validate {path}` shows them")
    comment = first_comment(Path(path).read_text(encoding="utf-8"))
    cited = _ARXIV.search(comment) or _AUTHORS_AND_YEAR.search(comment)
    summary = _SENTENCE_END.split(comment)[0].removesuffix(".")
    return MethodPage(name=name, summary=summary, comment=comment, paper=cited[0] if cited else "", spec=spec)


def find_pages(words: Sequence[str] = ()) -> list[MethodPage]:
    """Returns the packaged pages in whose name, comment or needs each of the words occurs, in any case.

    Raises UnreadableInput if there is none.
    """
    pages = [method_page(name) for name in packaged_methods()]
    texts = {page.name: " ".join((page.name, page.comment, *page.needs)).lower() for page in pages}
    found = [page for page in pages if all(word.lower() in texts[page.name] for word in words)]
    if not found:
        known = [page.name for page in pages]
        hint = did_you_mean(words[0], known) or "`sdkit methods` lists all of them"
        raise UnreadableInput(f"no packaged method has {listed(words, ' and ')} in its page", hint=hint)
    return found


def list_pages(pages: Sequence[MethodPage], width: int | None = None) -> str:
    """Returns a line for each page: name, paper, needs, summary; a longer one is cut at `width`."""
    cells = [(page.name, page.paper or "–", ", ".join(page.needs) or "–", page.summary) for page in pages]
    rows = [("method", "paper", "needs", "summary"), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join(line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines)


def columns_of_method(spec: MethodSpec) -> list[str]:
    """Returns sdkit's names of the columns that a method reads besides the prompt."""
    names = [slot.name for _, slot in spec.placed_slots() if isinstance(slot, ColumnSlot)]
    if spec.rollout.data_column:
        names.append(spec.rollout.data_column)
    if spec.teacher and isinstance(spec.teacher.weights, RoutedWeights):
        names.append(spec.teacher.weights.by)
    return list(dict.fromkeys(names))


def needs_turns(spec: MethodSpec) -> bool:
    """Returns whether the sampler, a term of the objective, or the teacher's context needs completions of several turns."""
    by_turn = spec.rollout.starts_with is not None or (spec.sees is not None and spec.sees.by_turn)
    return by_turn or any(term.turn_setting for term in spec.losses.values())


def _needs(spec: MethodSpec) -> Iterator[str]:
    yield from (f"column {name}" for name in columns_of_method(spec))
    feedback = {slot.of for _, slot in spec.placed_slots() if isinstance(slot, Feedback)}
    if needs_turns(spec):
        yield "an environment with feedback" if "turn" in feedback else "an environment"
    if "trajectory" in feedback:
        yield "a reward with feedback"
    elif next(reward_users(spec), None):
        yield "a reward"
    models = len(list(spec.external_teachers()))
    if models:
        yield "a teacher model" if models == 1 else f"{models} teacher models"
    if spec.blend and isinstance(spec.blend.base, ExternalWeights):
        yield "the teacher's base model"
    if any(spec.served_teachers()):
        yield "a teacher server"
    if spec.writer:
        yield "a writer's server"


def first_comment(text: str) -> str:
    """Returns the comment lines that a file begins with, as one line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
