"""Rewards, answer extraction, and suites of held-out prompts."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

from sdkit.language.specs.data import DataSpec
from sdkit.language.specs.fields import (
    AT_LEAST_64,
    AT_LEAST_ONE,
    GREEDY_OR_TEMPERATURE,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    PATTERN,
    SECONDS,
    SIGNED,
    TOP_P,
    Table,
    spec_field,
)


@frozen(kw_only=True)
class WholeText:
    """The whole completion, stripped of white space at both ends."""

    kind: ClassVar[str] = "whole"


@frozen(kw_only=True)
class Tagged:
    """The text between the last `<tag>` and `</tag>`."""

    kind: ClassVar[str] = "tagged"
    tag: str = spec_field("name of the tag", default="answer", range=NAME)


@frozen(kw_only=True)
class LastNumber:
    """The last number in the completion."""

    kind: ClassVar[str] = "last_number"


@frozen(kw_only=True)
class LastChoice:
    """The last standalone capital letter."""

    kind: ClassVar[str] = "last_choice"


@frozen(kw_only=True)
class LastCodeBlock:
    """The content of the last complete code block, between lines of three backticks."""

    kind: ClassVar[str] = "code_block"


@frozen(kw_only=True)
class LastWord:
    """The last word of the completion, without the punctuation around it."""

    kind: ClassVar[str] = "last_word"


@frozen(kw_only=True)
class LastMatch:
    """The last match of a pattern in the completion: its first group, if it has groups, and otherwise the match."""

    kind: ClassVar[str] = "pattern"
    pattern: str = spec_field("Python regular expression", range=PATTERN)


Extract = WholeText | Tagged | LastNumber | LastChoice | LastCodeBlock | LastWord | LastMatch


@frozen(kw_only=True)
class ReasoningGymReward:
    """The reasoning-gym task's own scorer; needs data of kind reasoning_gym."""

    kind: ClassVar[str] = "reasoning_gym"
    extract: Extract = spec_field("how to find the answer in the completion", default=WholeText())
    full_marks_only: bool = spec_field("count partial credit as 0", default=True)


@frozen(kw_only=True)
class ExactReward:
    """1 if the answer equals the column, else 0."""

    kind: ClassVar[str] = "exact"
    answer: str = spec_field("column with the right answer", default="answer", range=NAME)
    extract: Extract = spec_field("how to find the answer in the completion", default=WholeText())
    ignore_case: bool = spec_field("ignore case when comparing", default=False)


@frozen(kw_only=True)
class NumberReward:
    """1 if the answer equals the column's number within the tolerance, else 0."""

    kind: ClassVar[str] = "number"
    answer: str = spec_field("column with the right answer", default="answer", range=NAME)
    extract: Extract = spec_field("how to find the answer in the completion", default=LastNumber())
    tolerance: float = spec_field("largest difference", default=1e-6, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class ChoiceReward:
    """1 if the answer is the column's letter, else 0."""

    kind: ClassVar[str] = "choice"
    answer: str = spec_field("column with the right letter", default="answer", range=NAME)
    extract: Extract = spec_field("how to find the answer in the completion", default=LastChoice())


@frozen(kw_only=True)
class RegexReward:
    """1 if the pattern matches anywhere in the completion, else 0."""

    kind: ClassVar[str] = "regex"
    pattern: str = spec_field(
        "Python regular expression; `^` and `$` match only at the ends of the text", range=PATTERN
    )


@frozen(kw_only=True)
class MathVerifyReward:
    """1 if math-verify finds the answer equal to the column, else 0; needs the package math-verify."""

    kind: ClassVar[str] = "math_verify"
    answer: str = spec_field("column with the right answer, plain or LaTeX", default="answer", range=NAME)
    extract: Extract = spec_field("the part of the completion to search for the answer", default=WholeText())
    seconds: float = spec_field("time limit of one comparison; a slower one scores 0", default=5.0, range=SECONDS)


@frozen(kw_only=True)
class PythonTests:
    """Runs the completion's Python program against the tests of its row in a sandbox.

    The column of tests has Python source with asserts, `test_…` functions or unittest classes; a list of such sources;
    or LiveCodeBench cases of standard input and output, or of a function's arguments and return value: a list of
    {input, output, testtype: stdin | functional, fn_name}, or {inputs: […], outputs: […], testtype, fn_name,
    time_limit}; each as text or as JSON in a text.  Printed and returned values are compared outside the sandbox.
    Test source runs in the program's own interpreter: a program that exits early passes no test, but one that
    redefines what `==` or `assert` do to its values can pass.
    """

    kind: ClassVar[str] = "python_tests"
    tests: str = spec_field("column with the tests", default="tests", range=NAME)
    extract: Extract = spec_field("how to find the program in the completion", default=LastCodeBlock())
    credit: Literal["all", "share"] = spec_field(
        "`all`: 1 if every test passes, else 0; `share`: the share of tests passed", default="all"
    )
    seconds: float = spec_field("wall-clock limit of one test", default=10.0, range=SECONDS)
    cpu_seconds: int = spec_field(
        "CPU time limit of one test; a row's own time_limit applies if it is smaller", default=6, range=AT_LEAST_ONE
    )
    total_seconds: float = spec_field(
        "wall-clock limit of all tests of a completion; tests not reached fail", default=60.0, range=SECONDS
    )
    memory_mib: int = spec_field(
        "address space of a program, including the interpreter", default=1024, range=AT_LEAST_64
    )
    files_mib: int = spec_field(
        "space in the program's working folder, which is emptied after each test; without namespaces nothing can be written",
        default=16,
        range=AT_LEAST_ONE,
    )
    output_kib: int = spec_field(
        "output limit of one test; a test that exceeds it is ended", default=1024, range=AT_LEAST_ONE
    )
    packages: bool = spec_field("let programs import packages from sdkit's environment, such as numpy", default=False)
    at_once: int = spec_field("programs run concurrently", default=4, range=AT_LEAST_ONE)
    isolation: Literal["namespaces", "without_namespaces"] = spec_field(
        "`namespaces`: no network and no files but Python's own; an error on machines without user "
        "namespaces.  `without_namespaces`: resource limits and a system call filter only; no network and "
        "no writing either, but programs can read every file that you can",
        default="namespaces",
    )
    feedback_characters: int = spec_field(
        "length limit of the feedback on the first failed test", default=2000, range=AT_LEAST_ONE
    )


@frozen(kw_only=True)
class RewardModel:
    """The single output of a sequence-classification model applied to prompt and completion as a chat."""

    kind: ClassVar[str] = "reward_model"
    path: str = spec_field("local folder, relative to the spec; safetensors only", path_to="file")
    batch_size: int = spec_field("completions per forward pass", default=8, range=AT_LEAST_ONE)


@frozen(kw_only=True)
class FileReward:
    """A user-defined function: (completion: str, row: dict) → number, or (number, feedback text).

    It is called once before training with an empty completion, because students produce empty completions.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", path_to="file")
    function: str = spec_field("name of the function", range=NAME)
    seconds: float = spec_field(
        "time limit of one completion; the run ends if it is exceeded", default=60.0, range=SECONDS
    )
    at_once: int = spec_field(
        "concurrent calls; more than 1 needs a thread-safe function", default=1, range=AT_LEAST_ONE
    )


@frozen(kw_only=True)
class EnvironmentReward:
    """What the environment gives a trajectory: `get_reward()` of its class; 0 if it gives nothing."""

    kind: ClassVar[str] = "environment"


@frozen(kw_only=True)
class InstructionChecks:
    """Whether the completion passes the checks of its row, such as `[{check: words, at_most: 30}, {check: upper_case}]`.

    docs/experiments.md lists the checks.
    """

    kind: ClassVar[str] = "instruction_checks"
    checks: str = spec_field("column with the list of checks", default="checks", range=NAME)
    credit: Literal["all", "share"] = spec_field(
        "`all`: 1 if every check passes, else 0; `share`: the share of checks passed", default="all"
    )


@frozen(kw_only=True)
class WeightedReward:
    """A weighted sum of other rewards; the parts are logged too."""

    kind: ClassVar[str] = "weighted"
    parts: Table[float] = spec_field("names of rewards and their weights", range=NOT_EMPTY, each=SIGNED, names=NAME)


Reward = (
    ReasoningGymReward
    | ExactReward
    | NumberReward
    | ChoiceReward
    | RegexReward
    | MathVerifyReward
    | PythonTests
    | RewardModel
    | FileReward
    | EnvironmentReward
    | InstructionChecks
    | WeightedReward
)


def column_of(reward: Reward) -> str | None:
    """The column that a reward reads; None if it reads none."""
    return next(filter(None, (getattr(reward, name, None) for name in ("answer", "tests", "checks"))), None)


@frozen(kw_only=True)
class Decoding:
    """Sampling settings for evaluation."""

    temperature: float = spec_field("sampling temperature; 0 is greedy", range=GREEDY_OR_TEMPERATURE)
    top_p: float = spec_field("nucleus sampling: probability mass to sample from", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "sample from the k likeliest tokens; 0 samples from all", default=0, range=NOT_NEGATIVE_COUNT
    )
    samples: int = spec_field("completions per prompt", default=1, range=AT_LEAST_ONE)


GREEDY_AND_SAMPLED: Table[Decoding] = Table(
    {"greedy": Decoding(temperature=0.0), "sampled": Decoding(temperature=1.0)}
)


@frozen(kw_only=True)
class HeldOutPrompts:
    """Held-out prompts, how they are answered, and how the answers are scored."""

    data: DataSpec = spec_field("held-out rows")
    same_prompts: Literal["drop", "keep"] = spec_field(
        "what to do with training rows whose prompt is in the suite; `keep` them if the two are scored by different columns",
        default="drop",
    )
    score: str = spec_field("the reward to report as the headline", range=NAME)
    pass_score: float | None = spec_field(
        "smallest `score` of a completion that counts as passed, for pass@k of decodings with several samples; null: no "
        "pass@k",
        default=1.0,
        range=SIGNED,
    )
    also: tuple[str, ...] = spec_field("further rewards to report", default=(), each=NAME)
    decoding: Table[Decoding] = spec_field("sampling settings, by name", default=GREEDY_AND_SAMPLED, range=NOT_EMPTY)
    max_new_tokens: int | None = spec_field(
        "longest completion, tokens (default: the rollout's)", default=None, range=AT_LEAST_ONE
    )


@frozen(kw_only=True)
class Suite(HeldOutPrompts):
    """One named set of held-out prompts."""

    loss_prompts: int = spec_field(
        "number of held-out prompts on which all training metrics are computed", default=64, range=NOT_NEGATIVE_COUNT
    )
