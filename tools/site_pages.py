"""Hooks of the documentation site (mkdocs.yml): README and other files of the root are pages, and so is each file of the
repository that a page links to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {ROOT / "README.md": "index.md"}
PAGES |= {ROOT / f"{name.upper()}.md": f"{name}.md" for name in ("contributing", "changelog", "security")}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""The target of a relative link, without its anchor."""


def on_files(files: Any, config: Any) -> None:
    """Adds the pages that are not in docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for page in (*PAGES, *DOCS.glob("*.md")):
        for target in LINK.findall(page.read_text("utf-8")):
            for path in _shown(page.parent / target):
                if not files.get_file_from_path(_uri(path)):
                    files.append(File.generated(config, _uri(path), content=_listing(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    folder = ROOT if page.file.src_uri in PAGES.values() else DOCS
    if page.file.src_uri.startswith("files/"):
        return markdown
    return LINK.sub(lambda match: _uri((folder / match[1]).resolve()), markdown)


def _shown(target: Path) -> list[Path]:
    """The files and folders outside docs/ that need a page so that `target` has one."""
    path = target.resolve()
    if path in PAGES or path.is_relative_to(DOCS) or not path.exists():
        return []
    return [path, *sorted(path.glob("*.yaml"))]


def _uri(path: Path) -> str:
    """The file's page, or its copy, on the site."""
    if path in PAGES:
        return PAGES[path]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"files/{path.relative_to(ROOT).as_posix()}.md"


def _listing(path: Path) -> str:
    """A file's text, or links to the specs of a folder."""
    title = f"# `{path.relative_to(ROOT)}`\n\n"
    if path.is_dir():
        return title + "\n".join(
            f"- [{file.name}]({path.name}/{file.name}.md)" for file in sorted(path.glob("*.yaml"))
        )
    return f"{title}````{path.suffix.lstrip('.')}\n{path.read_text('utf-8')}````\n"
