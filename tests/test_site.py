"""`make docs` builds the documentation site, and refuses broken links between its pages and to the repository's files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PARTS = ("docs", "tools", "specs", "sdkit/methods", "mkdocs.yml", "LICENSE", "CITATION.cff", *PAGES)
BROKEN = "\n[page](docs/none.md) [anchor](docs/glossary.md#none) [file](specs/none.yaml)\n"


def _build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )


def test_site_has_every_page_and_refuses_broken_links(tmp_path):
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    built = _build(tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} | {
        "index",
        "contributing",
        "changelog",
        "security",
    } <= pages
    assert "revers" in (tmp_path / "site/search/search_index.json").read_text(encoding="utf-8")
    assert (tmp_path / "site/files/sdkit/methods/sdft.yaml.html").is_file()

    with (tmp_path / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(BROKEN)
    failed = _build(tmp_path)
    assert failed.returncode == 1
    assert all(target in failed.stderr for target in ("'none.md'", "'glossary.md#none'", "'files/specs/none.yaml.md'"))
