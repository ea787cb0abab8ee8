"""The worked line of a sum, right to the last token; feedback on a wrong one is the last digit of the result."""

from collections.abc import Mapping
from typing import Any


def worked_line(completion: str, row: Mapping[str, Any]) -> tuple[float, str | None]:
    """1 where the completion is the column `demonstration`, such as "7 + 9 = 16"; else 0 and the last digit."""
    if completion.strip() == row["demonstration"]:
        return 1.0, None
    return 0.0, f"That is not right. The last digit of the result is {row['demonstration'][-1]}."
