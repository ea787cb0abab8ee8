"""`sdkit train --dry-run`: calls every reward on completions made of the rows' own texts, before a model writes any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console

from sdkit.batches import Row
from sdkit.language import columns
from sdkit.rewards.scoring import Scorer, score
from sdkit.stdout import print_warning
from sdkit.train.inputs import RunData

ROWS = 8
"""Rows of each data set on which the rewards are called."""
EMPTY = "an empty completion"


def try_rewards(data: RunData, console: Console) -> None:
    """Score the texts of a few rows, as if they were completions, with every reward of every data set, and print the means.

    Raises BadData as the rewards do.
    """
    sets = {"training rows": (data.train_rewards, data.train)}
    sets |= {f"suite {name}": (data.rewards[name], rows) for name, rows in data.suites.items()}
    for name, (rewards, rows) in sets.items():
        means = mean_scores(data, rewards, rows[:ROWS])
        for reward, scores in means.items():
            texts = ", ".join(f"{mean:.2f} for {text}" for text, mean in scores.items())
            console.print(f"reward {reward}, {name}: {texts}", markup=False, highlight=False)
            if len(scores) > 1 and len(set(scores.values())) == 1:
                print_warning(
                    console,
                    f"{reward} does not tell the rows' own texts from an empty completion",
                    "it may need a form that these texts lack, such as tags; else check its columns and its pattern",
                )


def mean_scores(data: RunData, rewards: Mapping[str, Scorer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Each reward's mean score of each kind of text: a column's text, or nothing."""
    spec = data.spec
    names = {*columns.shown_columns(spec), *columns.answer_columns(spec, spec.rewards)}
    kinds = {f"the text of '{name}'": [(row, row.text(name)) for row in rows] for name in sorted(names)}
    kinds[EMPTY] = [(row, "") for row in rows]
    means: dict[str, dict[str, float]] = {name: {} for name in rewards}
    for kind, pairs in kinds.items():
        given = [(row, text) for row, text in pairs if text is not None]
        if given:
            scored = score(rewards, [text for _, text in given], [row for row, _ in given])
            for name, scores in scored.items():
                means[name][kind] = fmean(s.reward for s in scores)
    return means
