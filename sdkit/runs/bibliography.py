"""BibTeX of the papers that a method page cites, and of sdkit itself.

A page's first comment cites a paper as `Authors YEAR, "Title", arXiv ID`; authors and title may be missing.  Only what the
packaged pages say is written: an author list that they do not have is never guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from attrs import evolve, frozen

from sdkit import __version__
from sdkit.language.method_pages import first_comment
from sdkit.language.overlay import packaged_methods, packaged_page

SOFTWARE_TITLE = "sdkit: declarative self-distillation and on-policy distillation of language models"
SOFTWARE_AUTHORS = "The sdkit authors"

_AUTHORS = r"(?P<author>[A-Z]\w+)(?P<others> et al\.)? (?P<year>(?:19|20)\d\d)"
_TITLE = r'"(?P<title>[^"]+)"(?: \([^)]*\))?'
_ARXIV = r"arXiv (?P<arxiv>\d{4}\.\d{5})"
_CITED = re.compile(rf"(?:{_AUTHORS}, )?(?:{_TITLE},? (?:\([^)]*\), )?)?{_ARXIV}")
_CITED_ELSEWHERE = re.compile(rf"{_AUTHORS}, {_TITLE}")
_ACCENTS = {
    "\N{COMBINING GRAVE ACCENT}": "`",
    "\N{COMBINING ACUTE ACCENT}": "'",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^",
    "\N{COMBINING TILDE}": "~",
    "\N{COMBINING DIAERESIS}": '"',
    "\N{COMBINING CEDILLA}": "c",
    "\N{COMBINING CARON}": "v",
    "\N{COMBINING RING ABOVE}": "r",
}


@frozen(kw_only=True)
class Paper:
    """What is known of a paper."""

    arxiv: str | None = None
    author: str | None = None  # family name of the first author
    has_others: bool = False  # whether it has more authors
    year: int
    title: str | None = None

    @property
    def key(self) -> str:
        """The key of the BibTeX entry: `name2026`, or `arxiv2601.20802` without an author."""
        if self.author is None:
            return f"arxiv{self.arxiv}"
        plain = unicodedata.normalize("NFKD", self.author).encode("ascii", "ignore").decode().lower()
        return f"{plain}{self.year}" + (f"_{self.arxiv}" if self.arxiv else "")

    @property
    def label(self) -> str:
        """The paper as running text names it: `Name et al. (2026)`, or its arXiv id."""
        if self.author is None:
            return f"arXiv:{self.arxiv}"
        return f"{self.author}{' et al.' if self.has_others else ''} ({self.year})"

    def bibtex(self) -> str:
        """Returns the BibTeX entry; fields that are not known are left out."""
        fields: dict[str, str] = {}
        if self.author:
            fields["author"] = _with_accents(self.author) + (" and others" if self.has_others else "")
        if self.title:
            fields["title"] = f"{{{_with_accents(self.title)}}}"
        fields["year"] = str(self.year)
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{self.arxiv}"}
        return _entry(self.key, fields)


def software_bibtex() -> str:
    """Returns the entry of sdkit, which says what CITATION.cff says."""
    fields = {
        "author": f"{{{SOFTWARE_AUTHORS}}}",
        "title": f"{{{SOFTWARE_TITLE}}}",
        "note": f"Software, version {__version__}",
    }
    return _entry("sdkit", fields)


def papers_in(comment: str) -> list[Paper]:
    """Returns the papers that a page's comment cites, the method's own first; none if it cites none.

    What it does not say of a paper comes from the packaged pages that cite the same one.
    """
    papers = {paper.arxiv: paper for paper in _arxiv_papers(comment)}
    if not papers:
        return [_paper(match) for match in _CITED_ELSEWHERE.finditer(comment)][:1]
    return [_completed(paper, _packaged().get(paper.arxiv or "", ())) for paper in papers.values()]


def _arxiv_papers(comment: str) -> Iterator[Paper]:
    for match in _CITED.finditer(comment):
        yield _paper(match)


def _paper(match: re.Match[str]) -> Paper:
    named = match.groupdict()
    arxiv = named.get("arxiv")
    year = int(named["year"]) if named["year"] else 2000 + int((arxiv or "")[:2])
    return Paper(
        arxiv=arxiv, author=named["author"], has_others=bool(named["others"]), year=year, title=named["title"]
    )


def _completed(paper: Paper, others: Sequence[Paper]) -> Paper:
    """The paper, with the author, year and title that others say of it."""
    for other in others:
        if paper.author is None and other.author:
            paper = evolve(paper, author=other.author, has_others=other.has_others, year=other.year)
        if paper.title is None and other.title:
            paper = evolve(paper, title=other.title)
    return paper


@cache
def _packaged() -> dict[str, list[Paper]]:
    """What the packaged pages say of each paper, by its arXiv id."""
    papers: dict[str, list[Paper]] = {}
    for name in packaged_methods():
        for paper in _arxiv_papers(first_comment(Path(packaged_page(name)).read_text(encoding="utf-8"))):
            papers.setdefault(paper.arxiv or "", []).append(paper)
    return papers


def _entry(key: str, fields: dict[str, str]) -> str:
    width = max(map(len, fields))
    lines = [f"  {name:<{width}} = {{{value}}}" for name, value in fields.items()]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


def _with_accents(text: str) -> str:
    """The text as BibTeX's classic styles read it: accented letters spelled out, as in `{\\"{u}}`, and & % # _ escaped."""
    parts: list[str] = []
    for char in re.sub(r"[&%#_$]", r"\\\g<0>", text):
        base, *marks = unicodedata.normalize("NFD", char)
        accent = _ACCENTS.get(marks[0]) if len(marks) == 1 else None
        parts.append(f"{{\\{accent}{{{base}}}}}" if accent else char)
    return "".join(parts)
