"""docs/metrics.md: every metric of a run with its formula, unit and healthy range.

`python tools/freeze_metrics.py` writes the page from sdkit/language/metric_names.py; `--check` only compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdkit.language.metric_names import CHAPTERS, METRICS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
INTRODUCTION = """# The metrics

`metrics.jsonl` has a line for each training step, each evaluation and the teacher's lift; the run's trackers have the same figures.
In a name, words in capitals stand for names of the spec: TERM is a loss term, REWARD a reward, SUITE and DECODING a suite of
the evaluation and one of its decodings, FILTER a filter of `rollout.keep`, SLOT a slot of the teacher's context, KEY a key
with a schedule. METRIC is any metric of the objective.

S is the student, T the teacher, ℓ a term's loss at one token. A term's means are over the tokens that it counts, on all ranks;
shares and means of rollouts are over all ranks too. With several updates in a step, means of terms are averaged over them.
Times are those of the first process. The column *healthy* says what a run that learns looks like; empty: it depends on the
task. A score has three more metrics, with `_low`, `_high` (its 95 % interval) and `_n` (prompts) at the end of its name.

Written by `tools/freeze_metrics.py` from `sdkit/language/metric_names.py`.
"""


def page() -> str:
    """The whole page: a table for each chapter."""
    parts = [INTRODUCTION]
    for title, metrics in CHAPTERS.items():
        cells = [(f"`{m.name}`", m.formula.replace("|", "\\|"), m.unit, m.healthy) for m in metrics]
        rows = [f"| {' | '.join(row)} |" for row in cells]
        parts.append(
            "\n".join([f"## {title}\n", "| metric | formula | unit | healthy |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def main() -> None:
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else f"{PAGE} is out of date: run tools/freeze_metrics.py")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(METRICS)} metrics")


if __name__ == "__main__":
    main()
