"""What a check found, and the table of all findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import asdict, frozen
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "note", "problem"]
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@frozen(kw_only=True)
class Finding:
    """The result of one check.  A note is something that runs can do without; a problem is what they cannot."""

    check: str
    state: State = "ok"
    found: str
    advice: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Returns the finding as JSON values."""
        return asdict(self)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Returns a table of the findings, each with its advice below."""
    table = Table("check", "", "found")
    for each in findings:
        state = f"[{COLOURS[each.state]}]{each.state}[/]"
        table.add_row(
            each.check, state, escape(each.found) + (f"\n[dim]= {escape(each.advice)}[/]" if each.advice else "")
        )
    return table
