"""docs/rules.md: every rule of the language with its reason, a spec that breaks it and one that keeps it.

`python tools/freeze_rules.py` writes the page, and the examples of `sdkit explain`, from `sdkit.language` and the pairs
in tests/err and tests/ok; `--check` only compares.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from sdkit.language.rules import RULES
from sdkit.language.rules.base import Rule
from sdkit.language.shape_codes import SHAPE_CODES, ShapeCode

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "rules.md"
EXAMPLES = ROOT / "sdkit" / "language" / "code_examples.json"
INTRODUCTION = """# The rules

`sdkit validate` first checks the file and each key by itself, as the first chapter says, and then how the keys fit
together.  An error stops the command; a warning does not.  The code in brackets at the end of a message is the name of
the rule: `sdkit explain CODE` prints its section.

Written by `tools/freeze_rules.py` from `sdkit/language/` and the examples in `tests/err` and `tests/ok`.
"""


def page() -> str:
    """The whole page: a chapter for what one key can break and for each file of rules, a section for each code."""
    chapters = [INTRODUCTION, "## The file and its keys\n", *map(_section, SHAPE_CODES.values())]
    for module, rules in groupby(RULES, key=lambda rule: rule.check.__module__):
        title = (sys.modules[module].__doc__ or "").partition("\n")[0]
        chapters.append(f"## {title.rstrip('.')}\n")
        chapters += [_section(rule) for rule in rules]
    return "\n".join(chapters)


def _section(rule: Rule | ShapeCode) -> str:
    scope = f"{rule.severity}, run files only" if rule.runs_only else rule.severity
    text = f"### `{rule.code}` ({scope})\n\n**{rule.summary[0].upper()}{rule.summary[1:]}.** {rule.reason}\n"
    if example := _example(rule.code):
        text += f"""
Breaks the rule:

{_fenced(example["breaks"], "yaml")}

{_fenced(example["message"], "text")}

Keeps it:

{_fenced(example["keeps"], "yaml")}
"""
    return text


def examples() -> str:
    """The examples of every code as JSON, which `sdkit explain` reads."""
    found = {code: _example(code) for code in [*SHAPE_CODES, *(rule.code for rule in RULES)]}
    return (
        json.dumps({code: example for code, example in found.items() if example}, indent=1, ensure_ascii=False) + "\n"
    )


def _example(code: str) -> dict[str, str] | None:
    """A spec that breaks the rule, the message, and a spec that keeps it; None for an override, which is in no file."""
    if code == "override":
        return None
    bad, good = _file("err", code), _file("ok", code)
    files = {"breaks": bad, "message": bad.with_suffix(".out"), "keeps": good}
    return {name: path.read_text(encoding="utf-8").rstrip() for name, path in files.items()}


def _file(folder: str, code: str) -> Path:
    """The spec named after the rule, or else the first of its variants, CODE-variant.yaml."""
    files = ROOT / "tests" / folder
    exact = files / f"{code}.yaml"
    return exact if exact.is_file() else min(files.glob(f"{code}-*.yaml"))


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def main() -> int:
    """Write both files, or check them; the exit code."""
    files = {PAGE: page(), EXAMPLES: examples()}
    if "--check" not in sys.argv[1:]:
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return 0
    if all(path.is_file() and path.read_text(encoding="utf-8") == text for path, text in files.items()):
        return 0
    print("the rules or their examples have changed: run tools/freeze_rules.py and read the diff")
    return 1


if __name__ == "__main__":
    sys.exit(main())
