"""docs/rules.md: every rule of the language with its reason, a spec that breaks it and one that keeps it.

`python tools/freeze_rules.py` writes the page from `sdkit.language.rules` and the pairs in tests/err and tests/ok;
`--check` only compares.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from sdkit.language.rules import RULES
from sdkit.language.rules.base import Rule

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "rules.md"
INTRODUCTION = """# The rules

`sdkit validate` checks a spec against these rules after it has checked each key by itself.  An error stops the command; a
warning does not.  The code in brackets at the end of a message is the name of the rule.

Written by `tools/freeze_rules.py` from `sdkit/language/rules/` and the examples in `tests/err` and `tests/ok`.
"""


def page() -> str:
    """The whole page: a chapter for each file of rules, a section for each rule."""
    chapters = [INTRODUCTION]
    for module, rules in groupby(RULES, key=lambda rule: rule.check.__module__):
        title = (sys.modules[module].__doc__ or "").partition("\n")[0]
        chapters.append(f"## {title.rstrip('.')}\n")
        chapters += [_section(rule) for rule in rules]
    return "\n".join(chapters)


def _section(rule: Rule) -> str:
    bad, good = _example("err", rule.code), _example("ok", rule.code)
    scope = f"{rule.severity}, run files only" if rule.runs_only else rule.severity
    message = bad.with_suffix(".out").read_text(encoding="utf-8").rstrip()
    return f"""### `{rule.code}` ({scope})

**{rule.summary[0].upper()}{rule.summary[1:]}.** {rule.reason}

Breaks the rule:

{_fenced(bad.read_text(encoding="utf-8"), "yaml")}

{_fenced(message, "text")}

Keeps it:

{_fenced(good.read_text(encoding="utf-8"), "yaml")}
"""


def _example(folder: str, code: str) -> Path:
    """The spec named after the rule, or else the first of its variants, CODE-variant.yaml."""
    files = ROOT / "tests" / folder
    exact = files / f"{code}.yaml"
    return exact if exact.is_file() else min(files.glob(f"{code}-*.yaml"))


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def main() -> int:
    """Write the page, or check it; the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("the rules or their examples have changed: run tools/freeze_rules.py and read the diff")
    return 1


if __name__ == "__main__":
    sys.exit(main())
