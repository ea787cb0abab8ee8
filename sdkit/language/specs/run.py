"""What a run needs besides its method: model, optimizer, length, machine, output."""

from __future__ import annotations

import re
from typing import Literal

from attrs import frozen

from sdkit.language.specs.data import DataSpec
from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    GIBIBYTES,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    OPTION,
    PARAMETERS,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    Table,
    between,
    spec_field,
)
from sdkit.language.specs.method import MethodSpec
from sdkit.language.specs.scores import EvaluationSpec, Reward

BETA = between(0.0, 0.999999)
"""AdamW divides by 1 − beta."""
ADAM_EPS = between(1e-16, 1e6)
GRADIENT_NORM = between(1e-12, 1e12)
RENDERING_ARGUMENTS = {
    "self",
    "conversation",
    "conversations",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "raise_exception",
    "strftime_now",
}
"""What `apply_chat_template` takes itself, and what it gives to every template."""
TEMPLATE_OPTION = Range(
    "the name of an option that only the template reads, such as enable_thinking",
    lambda v: (
        bool(re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,99}", v))
        and v not in RENDERING_ARGUMENTS
        and not v.endswith(("_token", "_tokens"))
    ),
)

# ── model ─────────────────────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class LoraSpec:
    """Low-rank adapters; the base weights stay as they are."""

    rank: int = spec_field("rank of the factors", range=AT_LEAST_ONE)
    alpha: float = spec_field("scale is alpha / rank", range=POSITIVE)
    targets: tuple[str, ...] | Literal["all_linear"] = spec_field(
        "names of the layers that get an adapter",
        default="all_linear",
        range=NOT_EMPTY,
        each=NAME,
    )


@frozen(kw_only=True)
class ShapeSpec:
    """A model's shape, for `sdkit plan` where its config.json cannot be read."""

    parameters: int = spec_field("number of parameters", range=PARAMETERS)
    hidden: int = spec_field("width of the hidden states", range=AT_LEAST_ONE)
    layers: int = spec_field("number of layers", range=AT_LEAST_ONE)
    vocabulary: int = spec_field("rows of the output projection", range=AT_LEAST_ONE)
    context: int = spec_field("longest sequence the model takes, tokens", range=AT_LEAST_ONE)
    kv_width: int | None = spec_field(
        "width of a layer's keys, all heads together: how large the cache is (default: hidden)",
        default=None,
        range=AT_LEAST_ONE,
    )


@frozen(kw_only=True)
class ModelSpec:
    """The student, and the weights a teacher starts from."""

    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", range=PATH)
    revision: str | None = spec_field("commit or tag of a hub model", default=None, range=NAME)
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
        "arguments for the chat template, such as enable_thinking",
        default=Table(),
        each=OPTION,
        names=TEMPLATE_OPTION,
    )
    control_tokens: Literal["tokens", "text"] = spec_field(
        "what a control token becomes that a row or a rollout spells, such as <|im_end|>: the token, or plain text",
        default="tokens",
    )
    shape: ShapeSpec | None = spec_field(
        "stated shape, for `sdkit plan` without a hub", default=None
    )


# ── training ──────────────────────────────────────────────────────────────────────────────────


@frozen(kw_only=True)
class OptimizerSpec:
    """AdamW and its learning rate over the run."""

    lr: float = spec_field("peak learning rate", range=POSITIVE)
    betas: tuple[float, float] = spec_field("decay of the moments", default=(0.9, 0.999), each=BETA)
    eps: float = spec_field("added to the denominator", default=1e-8, range=ADAM_EPS)
    weight_decay: float = spec_field("decoupled weight decay", default=0.0, range=NOT_NEGATIVE)
    decay: Literal["weights", "all"] = spec_field(
        "which parameters weight_decay applies to: `weights` (all but biases and norms, as in transformers' Trainer), or "
        "`all`",
        default="weights",
    )
    clip: float = spec_field("largest gradient norm", default=1.0, range=GRADIENT_NORM)
    schedule: Literal["constant", "linear", "cosine"] = spec_field(
        "shape after the warm-up", default="constant"
    )
    warmup_steps: int = spec_field(
        "optimizer steps of linear warm-up", default=0, range=NOT_NEGATIVE_COUNT
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
    share_prompts: bool = spec_field(
        "completions of one prompt share a row of the forward pass, up to 2048 tokens, so that the prompt is computed "
        "once; left off by itself where the model's attention cannot",
        default=True,
    )
    zero_stage: Literal[0, 1, 2, 3] = spec_field(
        "what ranks share out (DeepSpeed ZeRO): 0 nothing, 1 masters and moments, 2 gradients too, 3 weights too",
        default=1,
    )
    offload: tuple[Literal["optimizer", "parameters"], ...] = spec_field(
        "what lies in the machine's memory instead of the accelerator's: `optimizer` (masters and moments), under "
        "stage 3 also `parameters`",
        default=(),
    )
    seed: int = spec_field("from which every other seed is derived", default=0, range=SEED)


@frozen(kw_only=True)
class MachineSpec:
    """The machine, where it is not the one at hand (for `sdkit plan`)."""

    ranks: int = spec_field("training processes", default=1, range=AT_LEAST_ONE)
    memory_gib: float | None = spec_field("memory per rank, GiB", default=None, range=GIBIBYTES)
    accelerator: Literal["a100_80", "h100", "h200", "gh200"] | None = spec_field(
        "the device of each rank; with it `sdkit plan` estimates the time of a step", default=None
    )


@frozen(kw_only=True)
class OutputSpec:
    """What a run leaves behind."""

    folder: str = spec_field(
        "where run directories are made, relative to where sdkit is started",
        default="runs",
        range=PATH,
    )
    samples_every: int = spec_field(
        "steps between samples on screen and in samples/", default=5, range=AT_LEAST_ONE
    )
    samples: int = spec_field("rollouts written each time", default=4, range=AT_LEAST_ONE)
    checkpoint_every: int | None = spec_field(
        "steps between checkpoints to resume from; the trained model is written in any case",
        default=None,
        range=AT_LEAST_ONE,
    )
    keep_checkpoints: int = spec_field(
        "how many of the newest checkpoints stay", default=1, range=AT_LEAST_ONE
    )
    keep_best: Literal["score", "loss"] | None = spec_field(
        "keep the model of the best evaluation in best/: by the headline's `score`, the higher the better, or by the first "
        "suite's `loss`",
        default=None,
    )
    tensorboard: bool = spec_field("write TensorBoard events", default=True)
    tripwire_steps: int | None = spec_field(
        "steps in a row that teach nothing (flat rewards, no counted token, no divergence, no gradient, all completions "
        "cut) before a warning says why; null: never",
        default=5,
        range=AT_LEAST_ONE,
    )


@frozen(kw_only=True)
class ExperimentSpec(MethodSpec):
    """A run file: a method, and all that a run needs besides."""

    model: ModelSpec = spec_field("the student")
    data: DataSpec = spec_field("training rows")
    rewards: Table[Reward] = spec_field("named scores of a completion", default=Table())
    reward: str | None = spec_field(
        "the reward that training uses, where the method needs one (default: the only one)",
        default=None,
        range=NAME,
    )
    evaluation: EvaluationSpec | None = spec_field("held-out measurement", default=None)
    optimizer: OptimizerSpec = spec_field("AdamW")
    training: TrainingSpec = spec_field("steps and batch sizes")
    machine: MachineSpec | None = spec_field("a machine other than this one", default=None)
    output: OutputSpec = spec_field("the run directory", default=OutputSpec())


def indivisible(spec: ExperimentSpec, ranks: int) -> str | None:
    """Why the prompts of a step cannot be dealt to so many ranks; None where they can."""
    size = spec.training.prompts_per_step
    if size % ranks == 0:
        return None
    return f"prompts_per_step is {size}, which {ranks} ranks cannot share equally"
