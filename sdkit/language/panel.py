"""The suites of an evaluation's panel, written out: rows, prompts, rewards and decodings of each.

Suites of lm-eval are known only once its task files are read, so they are not among them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import assert_never

from attrs import frozen

from sdkit.language import specs
from sdkit.language.errors import Path

INSTRUCTIONS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "panel", "instructions.jsonl")
"""The packaged instructions: a JSON object with `prompt` and `checks` on each line."""
REASONING_SEED = 20261128
"""Seed of the generated tasks; another seed would make scores of different runs incomparable."""
ASK_FOR_ANSWER = "{question}\n\nEnd your reply with the answer alone."


@frozen
class ReasoningTask:
    """A task of reasoning-gym at easy settings, and how its answer is found in a completion."""

    name: str
    options: Mapping[str, str | bool | int | float]
    reward: specs.Reward


_NUMBER = specs.NumberReward(answer="answer")
_WORD = specs.ExactReward(answer="answer", extract=specs.LastWord(), ignore_case=True)
REASONING_TASKS = (
    ReasoningTask("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}, _NUMBER),
    ReasoningTask("letter_counting", {"min_words": 4, "max_words": 6}, _NUMBER),
    ReasoningTask("leg_counting", {"min_animals": 1, "max_animals": 2, "max_instances": 2}, _NUMBER),
    ReasoningTask("needle_haystack", {"min_num_statements": 3, "max_num_statements": 4}, _WORD),
    ReasoningTask("number_sequence", {"max_complexity": 1, "min_terms": 4, "max_terms": 5}, _NUMBER),
    ReasoningTask("syllogism", {}, _WORD),
)
"""Arithmetic, spelling, a word problem, finding a fact, continuing a sequence, logic."""


@frozen(eq=False, kw_only=True)
class PlacedSuite:
    """A suite of the panel with the rewards that it names."""

    name: str
    entry: str  # the name of the panel's entry that it belongs to
    path: Path  # of the entry
    suite: specs.HeldOutPrompts
    rewards: Mapping[str, specs.Reward]
    is_packaged: bool  # its scores depend on sdkit alone, not on a user's files

    @property
    def scores(self) -> list[str]:
        """The names of the rewards that score it, the main one first."""
        return list(dict.fromkeys((self.suite.score, *self.suite.also)))


def panel_suites(spec: specs.ExperimentSpec) -> Iterator[PlacedSuite]:
    """Yields every suite of the panel but those of lm-eval, in order."""
    for path, entry in spec.panel_entries():
        match entry:
            case specs.InstructionSuite():
                yield _instructions(entry, path)
            case specs.ReasoningSuites():
                yield from (_reasoning(entry, path, task) for task in REASONING_TASKS)
            case specs.PanelSuite(name=name):
                yield PlacedSuite(
                    name=name, entry=name, path=path, suite=entry, rewards=spec.rewards, is_packaged=False
                )
            case specs.LmEvalTasks():
                pass
            case _:
                assert_never(entry)


def lm_eval_entries(spec: specs.ExperimentSpec) -> list[tuple[Path, specs.LmEvalTasks]]:
    """Returns the entries of the panel that lm-eval runs, each with its path."""
    return [(path, entry) for path, entry in spec.panel_entries() if isinstance(entry, specs.LmEvalTasks)]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return find_spec(package) is not None


def _instructions(entry: specs.InstructionSuite, path: Path) -> PlacedSuite:
    data = specs.DataSpec(
        source=specs.JsonLinesSource(path=INSTRUCTIONS),
        columns=specs.Table({"prompt": "prompt", "checks": "checks"}),
        limit=entry.size,
    )
    rewards = {"followed": specs.InstructionChecks(), "checks_passed": specs.InstructionChecks(credit="share")}
    return _packaged(entry, path, entry.kind, data, rewards)


def _reasoning(entry: specs.ReasoningSuites, path: Path, task: ReasoningTask) -> PlacedSuite:
    data = specs.DataSpec(
        source=specs.ReasoningGymSource(
            task=task.name, size=entry.size, seed=REASONING_SEED, options=specs.Table(task.options)
        ),
        columns=specs.Table({"prompt": specs.ColumnTemplate(template=ASK_FOR_ANSWER), "answer": "answer"}),
    )
    return _packaged(entry, path, f"{entry.kind}_{task.name}", data, {"correct": task.reward})


def _packaged(
    entry: specs.InstructionSuite | specs.ReasoningSuites,
    path: Path,
    name: str,
    data: specs.DataSpec,
    rewards: Mapping[str, specs.Reward],
) -> PlacedSuite:
    """A suite that comes with sdkit; the first of the rewards is its score."""
    score, *also = rewards
    suite = specs.HeldOutPrompts(
        data=data, score=score, also=tuple(also), decoding=entry.decoding, max_new_tokens=entry.max_new_tokens
    )
    return PlacedSuite(name=name, entry=entry.kind, path=path, suite=suite, rewards=rewards, is_packaged=True)
