"""Measures the data set's own completions against `rollout.max_new_tokens`."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from sdkit.language.errors import counted

MAX_ROWS_LISTED = 5
"""Rows that a warning names."""


@frozen(kw_only=True)
class DatasetCompletions:
    """Lengths of the data set's completions, of the rows that a run uses."""

    column: str
    rows: int
    cut: tuple[int, ...]  # numbers of the rows whose completion exceeds the limit
    longest: int  # tokens, end token included

    def warning(self, limit: int) -> str | None:
        """The warning about truncated completions, with their rows; None if there are none."""
        if not self.cut:
            return None
        more = ", …" if len(self.cut) > MAX_ROWS_LISTED else ""
        rows = ", ".join(f"row {index}" for index in self.cut[:MAX_ROWS_LISTED]) + more
        return (
            f"{len(self.cut)} of {counted(self.rows, 'completion')} in the column {self.column} are cut at "
            f"rollout.max_new_tokens ({limit}) and lose their end, the end token with it: {rows}"
        )


def measure_completions(column: str, lengths: Mapping[int, int], limit: int) -> DatasetCompletions:
    """Returns how many completions exceed `limit` tokens.  lengths: tokens by row number."""
    cut = tuple(index for index, length in lengths.items() if length > limit)
    longest = max(lengths.values(), default=0)
    return DatasetCompletions(column=column, rows=len(lengths), cut=cut, longest=longest)
