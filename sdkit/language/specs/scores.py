"""What a completion is worth, and what is measured on held-out prompts."""

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
    PATH,
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
    """What stands between the last <tag> and </tag>."""

    kind: ClassVar[str] = "tagged"
    tag: str = spec_field("name of the tag", default="answer", range=NAME)


@frozen(kw_only=True)
class LastNumber:
    """The last number in the completion."""

    kind: ClassVar[str] = "last_number"


@frozen(kw_only=True)
class LastChoice:
    """The last capital letter that stands alone."""

    kind: ClassVar[str] = "last_choice"


@frozen(kw_only=True)
class LastCodeBlock:
    """What stands in the last complete code block, between lines of three backticks."""

    kind: ClassVar[str] = "code_block"


Extract = WholeText | Tagged | LastNumber | LastChoice | LastCodeBlock


@frozen(kw_only=True)
class ReasoningGymReward:
    """The task's own scorer (needs data of kind reasoning_gym)."""

    kind: ClassVar[str] = "reasoning_gym"
    extract: Extract = spec_field("which part of the completion is the answer", default=WholeText())
    full_marks_only: bool = spec_field("count partial credit as 0", default=True)


@frozen(kw_only=True)
class ExactReward:
    """1 where the answer equals the column, else 0."""

    kind: ClassVar[str] = "exact"
    answer: str = spec_field("column with the right answer", default="answer", range=NAME)
    extract: Extract = spec_field("which part of the completion is the answer", default=WholeText())
    ignore_case: bool = spec_field("compare without regard to case", default=False)


@frozen(kw_only=True)
class NumberReward:
    """1 where the answer is the column's number, else 0."""

    kind: ClassVar[str] = "number"
    answer: str = spec_field("column with the right answer", default="answer", range=NAME)
    extract: Extract = spec_field(
        "which part of the completion is the answer", default=LastNumber()
    )
    tolerance: float = spec_field("largest difference", default=1e-6, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class ChoiceReward:
    """1 where the answer is the column's letter, else 0."""

    kind: ClassVar[str] = "choice"
    answer: str = spec_field("column with the right letter", default="answer", range=NAME)
    extract: Extract = spec_field(
        "which part of the completion is the answer", default=LastChoice()
    )


@frozen(kw_only=True)
class RegexReward:
    """1 where the pattern matches somewhere in the completion, else 0."""

    kind: ClassVar[str] = "regex"
    pattern: str = spec_field(
        "Python regular expression; `^` and `$` are the ends of the text", range=PATTERN
    )


@frozen(kw_only=True)
class MathVerifyReward:
    """1 where math-verify finds the answer equal to the column, else 0 (needs the package math-verify)."""

    kind: ClassVar[str] = "math_verify"
    answer: str = spec_field(
        "column with the right answer, plain or LaTeX", default="answer", range=NAME
    )
    extract: Extract = spec_field(
        "which part of the completion is searched for the answer", default=WholeText()
    )
    seconds: float = spec_field(
        "longest time for one comparison; what takes longer scores 0", default=5.0, range=SECONDS
    )


@frozen(kw_only=True)
class PythonTests:
    """What the completion's Python program does in the tests of its row, run in a sandbox.

    A column of tests has Python source of asserts, `test_…` functions or unittest classes; or a list of such sources;
    or LiveCodeBench's cases of standard input and output, or of a function's arguments and value: a list of
    {input, output, testtype: stdin | functional, fn_name}, or {inputs: […], outputs: […], testtype, fn_name,
    time_limit}; each as text or as JSON in a text.  What was printed or returned is compared outside of the sandbox.
    Source runs in the program's own interpreter: to leave early passes no test, but a program that changes what
    `==` or `assert` do to it can pass them.
    """

    kind: ClassVar[str] = "python_tests"
    tests: str = spec_field("column with the tests", default="tests", range=NAME)
    extract: Extract = spec_field(
        "which part of the completion is the program", default=LastCodeBlock()
    )
    credit: Literal["all", "share"] = spec_field(
        "`all`: 1 where every test is passed, else 0; `share`: the share that is passed",
        default="all",
    )
    seconds: float = spec_field("longest time for one test", default=10.0, range=SECONDS)
    cpu_seconds: int = spec_field(
        "longest processor time for one test; a row's own time_limit holds where it is smaller",
        default=6,
        range=AT_LEAST_ONE,
    )
    total_seconds: float = spec_field(
        "longest time for all tests of a completion; tests not reached fail",
        default=60.0,
        range=SECONDS,
    )
    memory_mib: int = spec_field(
        "address space of a program, the interpreter's included", default=1024, range=AT_LEAST_64
    )
    files_mib: int = spec_field(
        "space in its working folder, emptied after each test; without namespaces nothing can be written",
        default=16,
        range=AT_LEAST_ONE,
    )
    output_kib: int = spec_field(
        "longest output of one test; more ends it", default=1024, range=AT_LEAST_ONE
    )
    packages: bool = spec_field(
        "let programs import the packages installed beside sdkit, such as numpy", default=False
    )
    at_once: int = spec_field("programs at the same time", default=4, range=AT_LEAST_ONE)
    isolation: Literal["namespaces", "without_namespaces"] = spec_field(
        "`namespaces`: no network, no file but Python's own, refused where the machine allows no user "
        "namespaces; `without_namespaces`: limits and a system call filter alone, so no network and "
        "no writing either, but programs read what you can read",
        default="namespaces",
    )
    feedback_characters: int = spec_field(
        "longest text on the first test that failed", default=2000, range=AT_LEAST_ONE
    )


@frozen(kw_only=True)
class RewardModel:
    """The one output of a sequence-classification model that reads prompt and completion as a chat."""

    kind: ClassVar[str] = "reward_model"
    path: str = spec_field("local folder, relative to the spec; safetensors only", range=PATH)
    batch_rows: int = spec_field("completions read at the same time", default=8, range=AT_LEAST_ONE)


@frozen(kw_only=True)
class FileReward:
    """A function of the user's own: (completion: str, row: dict) → number, or (number, feedback text).

    It is called once before training, with an empty completion: students write such.
    """

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", range=PATH)
    function: str = spec_field("name of the function in it", range=NAME)
    seconds: float = spec_field(
        "longest time for one completion; the run ends where it takes longer",
        default=60.0,
        range=SECONDS,
    )
    at_once: int = spec_field(
        "calls at the same time; more than 1 needs a function that may run in several threads",
        default=1,
        range=AT_LEAST_ONE,
    )


@frozen(kw_only=True)
class WeightedReward:
    """The sum of other rewards, each times its weight; the parts are measured too."""

    kind: ClassVar[str] = "weighted"
    parts: Table[float] = spec_field(
        "names of rewards and their weights", range=NOT_EMPTY, each=SIGNED, names=NAME
    )


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
    | WeightedReward
)


def column_of(reward: Reward) -> str | None:
    """The column that a reward compares with; None where it needs none."""
    return getattr(reward, "answer", None) or getattr(reward, "tests", None)


@frozen(kw_only=True)
class Decoding:
    """How evaluation samples."""

    temperature: float = spec_field("0 is greedy", range=GREEDY_OR_TEMPERATURE)
    top_p: float = spec_field("nucleus sampling", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "keep the k likeliest tokens; 0 keeps all", default=0, range=NOT_NEGATIVE_COUNT
    )
    samples: int = spec_field("completions per prompt", default=1, range=AT_LEAST_ONE)


GREEDY_AND_SAMPLED: Table[Decoding] = Table(
    {"greedy": Decoding(temperature=0.0), "sampled": Decoding(temperature=1.0)}
)


@frozen(kw_only=True)
class Suite:
    """One named set of held-out prompts."""

    data: DataSpec = spec_field("held-out rows")
    same_prompts: Literal["drop", "keep"] = spec_field(
        "training rows whose prompt is held out too; keep where the two differ in what scores them",
        default="drop",
    )
    score: str = spec_field("the reward that is the headline", range=NAME)
    also: tuple[str, ...] = spec_field("further rewards to report", default=(), each=NAME)
    decoding: Table[Decoding] = spec_field(
        "named ways to sample", default=GREEDY_AND_SAMPLED, range=NOT_EMPTY
    )
    max_new_tokens: int | None = spec_field(
        "longest completion, tokens (default: the rollout's)", default=None, range=AT_LEAST_ONE
    )
    loss_prompts: int = spec_field(
        "held-out prompts on which every training metric is computed too",
        default=64,
        range=NOT_NEGATIVE_COUNT,
    )


@frozen(kw_only=True)
class EvaluationSpec:
    """What is measured on held-out prompts, and when."""

    suites: Table[Suite] = spec_field(
        "named sets of prompts; the first is the headline", range=NOT_EMPTY
    )
    every: int | None = spec_field(
        "steps between evaluations; first and last always", default=None, range=AT_LEAST_ONE
    )
    teacher_lift: int = spec_field(
        "held-out prompts on which the score under the teacher's view is measured before training; 0 skips",
        default=100,
        range=NOT_NEGATIVE_COUNT,
    )
