"""What a run needs besides its method: model, data, scores, evaluation, optimizer, machine, output."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from attrs import frozen

from sdkit.specs.fields import (
    AT_LEAST_ONE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TOP_P,
    Table,
    spec_field,
)
from sdkit.specs.method import MethodSpec

# ── model ─────────────────────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class LoraSpec:
    """Low-rank adapters; the base weights stay as they are."""

    rank: int = spec_field("rank of the factors", range=AT_LEAST_ONE)
    alpha: float = spec_field("scale is alpha / rank", range=POSITIVE)
    targets: tuple[str, ...] | Literal["all_linear"] = spec_field(
        "names of the layers that get an adapter", default="all_linear", range=NOT_EMPTY
    )


@frozen(kw_only=True)
class ShapeSpec:
    """A model's shape, for `sdkit plan` where its config.json cannot be read."""

    parameters: int = spec_field("number of parameters", range=AT_LEAST_ONE)
    hidden: int = spec_field("width of the hidden states", range=AT_LEAST_ONE)
    layers: int = spec_field("number of layers", range=AT_LEAST_ONE)
    vocabulary: int = spec_field("rows of the output projection", range=AT_LEAST_ONE)
    context: int = spec_field("longest sequence the model takes, tokens", range=AT_LEAST_ONE)


@frozen(kw_only=True)
class ModelSpec:
    """The student, and the weights a teacher starts from."""

    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", range=NOT_EMPTY)
    revision: str | None = spec_field("commit or tag of a hub model", default=None)
    dtype: Literal["float32", "bfloat16"] = spec_field(
        "precision of the forward pass; masters stay float32", default="bfloat16"
    )
    lora: LoraSpec | None = spec_field("train adapters instead of all weights", default=None)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = spec_field(
        "attention kernel", default="sdpa"
    )
    activation_checkpointing: bool = spec_field(
        "recompute activations in the backward pass to save memory", default=False
    )
    chat_template_options: Table[str | bool | int | float] = spec_field(
        "arguments for the chat template, such as enable_thinking", default=Table()
    )
    shape: ShapeSpec | None = spec_field(
        "stated shape, for `sdkit plan` without a hub", default=None
    )


# ── data ──────────────────────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class JsonLinesSource:
    """One JSON object a line."""

    kind: ClassVar[str] = "jsonl"
    path: str = spec_field("file, relative to the spec", range=NOT_EMPTY)


@frozen(kw_only=True)
class JsonSource:
    """A JSON file that holds a list of objects."""

    kind: ClassVar[str] = "json"
    path: str = spec_field("file, relative to the spec", range=NOT_EMPTY)


@frozen(kw_only=True)
class ParquetSource:
    """A Parquet file."""

    kind: ClassVar[str] = "parquet"
    path: str = spec_field("file, relative to the spec", range=NOT_EMPTY)


@frozen(kw_only=True)
class HubSource:
    """A data set of the Hugging Face hub (needs a network or a filled cache)."""

    kind: ClassVar[str] = "hub"
    path: str = spec_field("data set id", range=NOT_EMPTY)
    name: str | None = spec_field("configuration", default=None)
    split: str = spec_field("split", default="train")
    revision: str | None = spec_field("commit or tag", default=None)


@frozen(kw_only=True)
class DiskSource:
    """A data set written by `datasets.save_to_disk`."""

    kind: ClassVar[str] = "saved_dataset"
    path: str = spec_field("folder, relative to the spec", range=NOT_EMPTY)
    split: str | None = spec_field("split, where the folder holds several", default=None)


@frozen(kw_only=True)
class ReasoningGymSource:
    """A procedural task of reasoning-gym; rows carry `question`, `answer` and `metadata`."""

    kind: ClassVar[str] = "reasoning_gym"
    task: str = spec_field("task name, such as chain_sum", range=NOT_EMPTY)
    size: int = spec_field("rows to generate", range=AT_LEAST_ONE)
    seed: int = spec_field("seed of the generator", default=0, range=NOT_NEGATIVE)
    options: Table[str | bool | int | float] = spec_field(
        "the task's own settings", default=Table()
    )


@frozen(kw_only=True)
class InlineSource:
    """Rows written in the spec itself."""

    kind: ClassVar[str] = "inline"
    rows: tuple[Table[Any], ...] = spec_field("the rows", range=NOT_EMPTY)


Source = (
    JsonLinesSource
    | JsonSource
    | ParquetSource
    | HubSource
    | DiskSource
    | ReasoningGymSource
    | InlineSource
)


@frozen(kw_only=True)
class ColumnTemplate:
    """Text built from the columns of a row: `{column}`, or `{column.key}` into a map; `{{` and `}}` are braces."""

    template: str = spec_field("the text", range=NOT_EMPTY)


@frozen(kw_only=True)
class DataSpec:
    """Where rows come from and which of their columns mean what."""

    source: Source = spec_field("the rows")
    columns: Table[str | ColumnTemplate] | None = spec_field(
        "sdkit's name → the source's column or a template; `prompt` (text or chat messages) is required, `system`, "
        "`demonstration`, `answer` and any other name may follow; evaluation data take the training data's",
        default=None,
    )
    limit: int | None = spec_field("use the first so many rows", default=None, range=AT_LEAST_ONE)
    shuffle: bool = spec_field("take the rows in an order drawn from the run's seed", default=True)


# ── rewards and evaluation ────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class WholeText:
    """The whole completion, stripped of white space at both ends."""

    kind: ClassVar[str] = "whole"


@frozen(kw_only=True)
class Tagged:
    """What stands between the last <tag> and </tag>."""

    kind: ClassVar[str] = "tagged"
    tag: str = spec_field("name of the tag", default="answer", range=NOT_EMPTY)


@frozen(kw_only=True)
class LastNumber:
    """The last number in the completion."""

    kind: ClassVar[str] = "last_number"


@frozen(kw_only=True)
class LastChoice:
    """The last capital letter that stands alone."""

    kind: ClassVar[str] = "last_choice"


Extract = WholeText | Tagged | LastNumber | LastChoice


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
    answer: str = spec_field("column with the right answer", default="answer")
    extract: Extract = spec_field("which part of the completion is the answer", default=WholeText())
    ignore_case: bool = spec_field("compare without regard to case", default=False)


@frozen(kw_only=True)
class NumberReward:
    """1 where the answer is the column's number, else 0."""

    kind: ClassVar[str] = "number"
    answer: str = spec_field("column with the right answer", default="answer")
    extract: Extract = spec_field(
        "which part of the completion is the answer", default=LastNumber()
    )
    tolerance: float = spec_field("largest difference", default=1e-6, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class ChoiceReward:
    """1 where the answer is the column's letter, else 0."""

    kind: ClassVar[str] = "choice"
    answer: str = spec_field("column with the right letter", default="answer")
    extract: Extract = spec_field(
        "which part of the completion is the answer", default=LastChoice()
    )


@frozen(kw_only=True)
class RegexReward:
    """1 where the pattern matches somewhere in the completion, else 0."""

    kind: ClassVar[str] = "regex"
    pattern: str = spec_field(
        "Python regular expression; `^` and `$` are the ends of the text", range=NOT_EMPTY
    )


@frozen(kw_only=True)
class FileReward:
    """A function of the user's own: (completion: str, row: dict) → number."""

    kind: ClassVar[str] = "file"
    file: str = spec_field("Python file, relative to the spec", range=NOT_EMPTY)
    function: str = spec_field("name of the function in it", range=NOT_EMPTY)


Reward = ReasoningGymReward | ExactReward | NumberReward | ChoiceReward | RegexReward | FileReward


@frozen(kw_only=True)
class Decoding:
    """How evaluation samples."""

    temperature: float = spec_field("0 is greedy", range=NOT_NEGATIVE)
    top_p: float = spec_field("nucleus sampling", default=1.0, range=TOP_P)
    top_k: int = spec_field(
        "keep the k likeliest tokens; 0 keeps all", default=0, range=NOT_NEGATIVE
    )
    samples: int = spec_field("completions per prompt", default=1, range=AT_LEAST_ONE)


GREEDY_AND_SAMPLED: Table[Decoding] = Table(
    {"greedy": Decoding(temperature=0.0), "sampled": Decoding(temperature=1.0)}
)


@frozen(kw_only=True)
class Suite:
    """One named set of held-out prompts."""

    data: DataSpec = spec_field("held-out rows; training rows with the same prompt are dropped")
    score: str = spec_field("the reward that is the headline", range=NOT_EMPTY)
    also: tuple[str, ...] = spec_field("further rewards to report", default=())
    decoding: Table[Decoding] = spec_field(
        "named ways to sample", default=GREEDY_AND_SAMPLED, range=NOT_EMPTY
    )
    max_new_tokens: int | None = spec_field(
        "longest completion, tokens (default: the rollout's)", default=None, range=AT_LEAST_ONE
    )
    loss_prompts: int = spec_field(
        "held-out prompts on which every training metric is computed too",
        default=64,
        range=NOT_NEGATIVE,
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
        range=NOT_NEGATIVE,
    )


# ── training ──────────────────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class OptimizerSpec:
    """AdamW and its learning rate over the run."""

    lr: float = spec_field("peak learning rate", range=POSITIVE)
    betas: tuple[float, float] = spec_field("decay of the moments", default=(0.9, 0.999))
    eps: float = spec_field("added to the denominator", default=1e-8, range=POSITIVE)
    weight_decay: float = spec_field("decoupled weight decay", default=0.0, range=NOT_NEGATIVE)
    clip: float = spec_field("largest gradient norm", default=1.0, range=POSITIVE)
    schedule: Literal["constant", "linear", "cosine"] = spec_field(
        "shape after the warm-up", default="constant"
    )
    warmup_steps: int = spec_field(
        "optimizer steps of linear warm-up", default=0, range=NOT_NEGATIVE
    )
    final_share: float = spec_field(
        "share of lr at the end of linear or cosine", default=0.0, range=SHARE
    )


@frozen(kw_only=True)
class TrainingSpec:
    """How long, how much at once, and on how many pieces."""

    steps: int | None = spec_field(
        "rollout batches; give steps or epochs", default=None, range=AT_LEAST_ONE
    )
    epochs: float | None = spec_field("passes over the data", default=None, range=POSITIVE)
    prompts_per_step: int = spec_field(
        "prompts in a rollout batch, all ranks together", range=AT_LEAST_ONE
    )
    updates_per_rollout: int = spec_field(
        "optimizer steps on each rollout batch", default=1, range=AT_LEAST_ONE
    )
    micro_batch_tokens: int = spec_field(
        "padded tokens in one forward pass", default=8192, range=AT_LEAST_ONE
    )
    chunk_tokens: int = spec_field(
        "positions projected onto the vocabulary at once", default=256, range=AT_LEAST_ONE
    )
    zero_stage: Literal[0, 1, 2] = spec_field("DeepSpeed ZeRO stage", default=1)
    seed: int = spec_field("from which every other seed is derived", default=0, range=NOT_NEGATIVE)


@frozen(kw_only=True)
class MachineSpec:
    """The machine, where it is not the one at hand (for `sdkit plan`)."""

    ranks: int = spec_field("training processes", default=1, range=AT_LEAST_ONE)
    memory_gib: float | None = spec_field("memory per rank, GiB", default=None, range=POSITIVE)


@frozen(kw_only=True)
class OutputSpec:
    """What a run leaves behind."""

    folder: str = spec_field(
        "where run directories are made, relative to where sdkit is started", default="runs"
    )
    samples_every: int = spec_field(
        "steps between samples on screen and in samples/", default=5, range=AT_LEAST_ONE
    )
    samples: int = spec_field("rollouts written each time", default=4, range=AT_LEAST_ONE)
    checkpoint_every: int | None = spec_field(
        "steps between checkpoints; a checkpoint at the end is always written",
        default=None,
        range=AT_LEAST_ONE,
    )
    tensorboard: bool = spec_field("write TensorBoard events", default=True)


@frozen(kw_only=True)
class ExperimentSpec(MethodSpec):
    """A run file: a method, and all that a run needs besides."""

    model: ModelSpec = spec_field("the student")
    data: DataSpec = spec_field("training rows")
    rewards: Table[Reward] = spec_field("named scores of a completion", default=Table())
    evaluation: EvaluationSpec | None = spec_field("held-out measurement", default=None)
    optimizer: OptimizerSpec = spec_field("AdamW")
    training: TrainingSpec = spec_field("steps and batch sizes")
    machine: MachineSpec | None = spec_field("a machine other than this one", default=None)
    output: OutputSpec = spec_field("the run directory", default=OutputSpec())
