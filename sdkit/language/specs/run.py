"""Run settings besides the method: model, optimizer, length, machine and output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from attrs import frozen

from sdkit.language.specs.collapse import CollapseSpec
from sdkit.language.specs.data import DataSpec
from sdkit.language.specs.divergences import FileDivergence
from sdkit.language.specs.environment_kinds import Environment, GymnasiumEnvironment, environments_of
from sdkit.language.specs.environments import FileEnvironment, ToolsEnvironment
from sdkit.language.specs.evaluation import EvaluationSpec, LmEvalTasks, PanelEntry, PanelSuite
from sdkit.language.specs.fields import (
    AT_LEAST_ONE,
    GIBIBYTES,
    NAME,
    NOT_EMPTY,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    OPTION,
    PARAMETERS,
    POSITIVE,
    SECONDS,
    SEED,
    SHARE,
    TEXT_END,
    Range,
    Table,
    between,
    spec_field,
)
from sdkit.language.specs.losses import Distillation
from sdkit.language.specs.method import MethodSpec
from sdkit.language.specs.scores import Decoding, FileReward, HeldOutPrompts, Reward, RewardModel, Suite
from sdkit.language.specs.teachers import FrozenWeights
from sdkit.language.specs.token_weights import FileWeight

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
"""Arguments of `apply_chat_template` itself, and variables it passes to every template."""
_OPTION_NAME = "[A-Za-z_][A-Za-z0-9_]{0,99}"
TEMPLATE_OPTION = Range(
    "the name of an option that only the template reads, such as enable_thinking",
    lambda v: (
        bool(re.fullmatch(_OPTION_NAME, v)) and v not in RENDERING_ARGUMENTS and not v.endswith(("_token", "_tokens"))
    ),
    {
        "pattern": f"^{_OPTION_NAME}{TEXT_END}",
        "not": {"anyOf": [{"enum": sorted(RENDERING_ARGUMENTS)}, {"pattern": "_tokens?$"}]},
    },
)


@frozen(kw_only=True)
class LoraSpec:
    """Low-rank adapters (LoRA); the base weights stay unchanged."""

    r: int = spec_field("rank of the factors", range=AT_LEAST_ONE)
    lora_alpha: float = spec_field("scale is lora_alpha / r", range=POSITIVE)
    target_modules: tuple[str, ...] | Literal["all-linear"] = spec_field(
        "names of the modules that get an adapter", default="all-linear", range=NOT_EMPTY, each=NAME
    )
    quantize_base: Literal["nf4"] | None = spec_field(
        "`nf4` stores the frozen linear layers in 4 bits (QLoRA: NormalFloat with double quantization; embeddings and the "
        "output projection stay in `dtype`); needs the extra `bitsandbytes`",
        default=None,
    )


@frozen(kw_only=True)
class ShapeSpec:
    """A model's shape, for `sdkit plan` when the config.json is not available."""

    parameters: int = spec_field("number of parameters", range=PARAMETERS)
    hidden_size: int = spec_field("width of the hidden states", range=AT_LEAST_ONE)
    num_hidden_layers: int = spec_field("number of layers", range=AT_LEAST_ONE)
    vocab_size: int = spec_field("rows of the output projection", range=AT_LEAST_ONE)
    max_position_embeddings: int = spec_field("longest sequence the model takes, tokens", range=AT_LEAST_ONE)
    kv_width: int | None = spec_field(
        "width of a layer's keys over all heads, for caches and activations (default: hidden_size)",
        default=None,
        range=AT_LEAST_ONE,
    )
    q_width: int | None = spec_field(
        "width of a layer's queries over all heads (default: hidden_size)", default=None, range=AT_LEAST_ONE
    )
    intermediate_size: int | None = spec_field(
        "width of a layer's feed-forward part (default: what `parameters` leave for it)",
        default=None,
        range=AT_LEAST_ONE,
    )
    num_attention_heads: int | None = spec_field(
        "attention heads of a layer, for eager attention (default: one for each 128 of q_width)",
        default=None,
        range=AT_LEAST_ONE,
    )
    gated_mlp: bool = spec_field("whether the feed-forward part has a gate, as in Llama and Qwen", default=True)
    qk_norm: bool = spec_field("whether queries and keys are normalized, as in Qwen3", default=False)


@frozen(kw_only=True)
class ModelSpec:
    """The student model, also the initial weights of most teachers."""

    path: str = spec_field("`bundled:NAME`, a local folder, or a hub id", path_to="model")
    revision: str | None = spec_field("commit or tag of a hub model", default=None, range=NAME)
    dtype: Literal["float32", "bfloat16"] = spec_field(
        "precision of the forward pass; master weights stay float32", default="bfloat16"
    )
    lora: LoraSpec | None = spec_field("train adapters instead of all weights", default=None)
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = spec_field(
        "attention kernel; `flash_attention_2` needs the package flash-attn, a GPU and bfloat16, and shares no prompts "
        "(`training.share_prompts`)",
        default="sdpa",
    )
    activation_checkpointing: bool = spec_field(
        "recompute activations in the backward pass to save memory", default=False
    )
    chat_template_kwargs: Table[str | bool | int | float] = spec_field(
        "arguments for the chat template, such as enable_thinking", default=Table(), each=OPTION, names=TEMPLATE_OPTION
    )
    control_tokens: Literal["tokens", "text"] = spec_field(
        "how to encode the spelling of a control token, such as `<|im_end|>`, in a row or rollout: as the token or as plain text",
        default="tokens",
    )
    shape: ShapeSpec | None = spec_field("the model's shape, for `sdkit plan` without access to the hub", default=None)

    @property
    def quantized(self) -> Literal["nf4"] | None:
        """How the base weights under adapters are stored; None: in `dtype`."""
        return self.lora.quantize_base if self.lora else None


@frozen(kw_only=True)
class OptimizerSpec:
    """AdamW and its learning-rate schedule."""

    lr: float = spec_field("peak learning rate", range=POSITIVE)
    betas: tuple[float, float] = spec_field("decay rates of the moments", default=(0.9, 0.999), each=BETA)
    eps: float = spec_field("added to the denominator", default=1e-8, range=ADAM_EPS)
    weight_decay: float = spec_field("decoupled weight decay", default=0.0, range=NOT_NEGATIVE)
    decay: Literal["weights", "all"] = spec_field(
        "parameters that weight_decay applies to: `weights` (all but biases and norms, as in transformers' Trainer) or "
        "`all`",
        default="weights",
    )
    max_grad_norm: float = spec_field("maximum gradient norm", default=1.0, range=GRADIENT_NORM)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = spec_field(
        "learning-rate schedule after warm-up", default="constant"
    )
    warmup_steps: int = spec_field("optimizer steps of linear warm-up", default=0, range=NOT_NEGATIVE_COUNT)
    final_share: float = spec_field("share of lr at the end of a linear or cosine schedule", default=0.0, range=SHARE)


@frozen(kw_only=True)
class TrainingSpec:
    """Length of the run, batch sizes, and sharding."""

    steps: int | None = spec_field("rollout batches; give steps or epochs", default=None, range=AT_LEAST_ONE)
    epochs: float | None = spec_field("passes over the data", default=None, range=POSITIVE)
    prompts_per_step: int = spec_field("prompts in a rollout batch, over all ranks", range=AT_LEAST_ONE)
    updates_per_rollout: int = spec_field("optimizer steps on each rollout batch", default=1, range=AT_LEAST_ONE)
    micro_batch_tokens: int = spec_field(
        "tokens in one forward pass, padding included", default=8192, range=AT_LEAST_ONE
    )
    chunk_tokens: int = spec_field("positions whose logits are computed at once", default=256, range=AT_LEAST_ONE)
    share_prompts: bool = spec_field(
        "pack completions of one prompt into one row of the forward pass, up to 2048 tokens, so that the prompt is computed "
        "once; off automatically if the model's attention does not support it",
        default=True,
    )
    zero_stage: Literal[0, 1, 2, 3] = spec_field(
        "what DeepSpeed ZeRO shards across ranks: 0 nothing, 1 optimizer states (master weights and moments), 2 gradients too, 3 parameters too",
        default=1,
    )
    offload: tuple[Literal["optimizer", "parameters", "frozen_models"], ...] = spec_field(
        "what to offload to CPU memory: `optimizer` (master weights and moments); under stage 3 `parameters`; under stages 0 "
        "to 2 `frozen_models` (a frozen teacher, the reference and other models), which are copied to the device for each use",
        default=(),
    )
    reduce_dtype: Literal["float32", "bfloat16"] = spec_field(
        "precision in which gradients are summed over ranks: bfloat16 sends half as much, with a relative error of "
        "about 2e-3",
        default="float32",
    )
    reduce_bucket_size: int = spec_field(
        "gradient elements that are summed over ranks at a time; fewer need less memory",
        default=500_000_000,
        range=AT_LEAST_ONE,
    )
    allgather_bucket_size: int = spec_field(
        "weights that stages 1 and 2 gather at a time after an optimizer step; fewer need less memory",
        default=500_000_000,
        range=AT_LEAST_ONE,
    )
    deterministic: bool = spec_field(
        "train with CUDA kernels that give the same bits in every run: slower, and an operation without one is an error; a "
        "CPU needs no setting",
        default=False,
    )
    deadline_seconds: float = spec_field(
        "longest time that ranks wait for each other, at the start and in one collective operation; raise it if one rank "
        "works alone for longer, as on hashing large files from a slow disk",
        default=600.0,
        range=SECONDS,
    )
    seed: int = spec_field("seed from which all others are derived", default=0, range=SEED)


@frozen(kw_only=True)
class MachineSpec:
    """The machine to plan for, if it is not this one (for `sdkit plan`)."""

    ranks: int = spec_field("training processes", default=1, range=AT_LEAST_ONE)
    memory_gib: float | None = spec_field("memory per rank, GiB", default=None, range=GIBIBYTES)
    accelerator: Literal["a100_80", "h100", "h200", "gh200"] | None = spec_field(
        "device of each rank, which lets `sdkit plan` estimate the time of a step", default=None
    )


@frozen(kw_only=True)
class OutputSpec:
    """What a run writes."""

    folder: str = spec_field(
        "where run directories are created, relative to the working directory", default="runs", path_to="output"
    )
    samples_every: int = spec_field(
        "steps between samples shown on screen and written to samples/", default=5, range=AT_LEAST_ONE
    )
    samples: int = spec_field("rollouts written each time", default=4, range=AT_LEAST_ONE)
    checkpoint_every: int | None = spec_field(
        "steps between checkpoints for resuming (default: none); the trained model is always written",
        default=None,
        range=AT_LEAST_ONE,
    )
    keep_checkpoints: int = spec_field("number of newest checkpoints to keep", default=1, range=AT_LEAST_ONE)
    keep_best: str | None = spec_field(
        "keep the best evaluated model in best/: by the headline `score`, by the first suite's `loss`, or by "
        "SUITE/DECODING/NAME, where NAME is a reward, `pass_at_K`, `entropy`, `distinct_1`, `distinct_2`, "
        "`self_repetition`, `completion_tokens` or `cut_at_limit`",
        default=None,
        range=NAME,
    )
    best_is: Literal["higher", "lower"] | None = spec_field(
        "which value of `keep_best` is better; default: higher for scores, lower for `loss`, `self_repetition` and "
        "`cut_at_limit`; the others have no default",
        default=None,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = spec_field(
        "experiment trackers that get metrics, settings and samples: `tensorboard` (events in the run directory), `wandb` "
        "(offline, unless you have logged in) and `trackio` (a local database), which are extras of sdkit",
        default=("tensorboard",),
    )
    tripwire_steps: int | None = spec_field(
        "consecutive steps without learning signal (constant rewards, no counted tokens, no divergence, no gradient, or all "
        "completions truncated), or with a loss or gradient norm far above the run's history, before a warning; a run that "
        "ends this way, or with a collapsed score (`collapse.score`), ends as diverged; null: never, nor those of `collapse`",
        default=5,
        range=AT_LEAST_ONE,
    )
    collapse: CollapseSpec = spec_field("tripwires for a collapse of length, entropy or score", default=CollapseSpec())


@frozen(kw_only=True)
class ExperimentSpec(MethodSpec):
    """A run file: a method, and everything else that a run needs."""

    model: ModelSpec = spec_field("the student")
    data: DataSpec = spec_field("training rows")
    rewards: Table[Reward] = spec_field("scores of a completion, by name", default=Table())
    reward: str | None = spec_field(
        "the reward used in training, if the method needs one (default: the only one)", default=None, range=NAME
    )
    evaluation: EvaluationSpec | None = spec_field("evaluation on held-out prompts", default=None)
    environment: Environment | None = spec_field(
        "what the student is shown after a turn, before it samples another (default: a completion is one turn)",
        default=None,
    )
    optimizer: OptimizerSpec = spec_field("AdamW")
    training: TrainingSpec = spec_field("run length, batch sizes, and sharding")
    machine: MachineSpec | None = spec_field("a machine other than this one", default=None)
    output: OutputSpec = spec_field("the run directory", default=OutputSpec())

    @property
    def suites(self) -> Table[Suite]:
        """The suites of the evaluation, by name; empty if nothing is evaluated."""
        return self.evaluation.suites if self.evaluation else Table()

    def longest_completion(self, max_new_tokens: int | None = None) -> int:
        """Tokens of the longest completion: of all turns and observations of a trajectory, if there is an environment.

        `max_new_tokens`: the limit of a turn (default: the rollout's).
        """
        limit = self.rollout.max_new_tokens if max_new_tokens is None else max_new_tokens
        return self.environment.longest(limit) if self.environment else limit

    def placed_suites(self) -> Iterator[tuple[tuple[str | int, ...], str, HeldOutPrompts]]:
        """The path, the name and the spec of each suite of the user's: those of the task, and of the panel."""
        for name, suite in self.suites.items():
            yield ("evaluation", "suites", name), name, suite
        for path, entry in self.panel_entries():
            if isinstance(entry, PanelSuite):
                yield path, entry.name, entry

    def panel_entries(self) -> Iterator[tuple[tuple[str | int, ...], PanelEntry]]:
        """The path and the spec of each entry of the evaluation's panel."""
        for i, entry in enumerate(self.evaluation.panel if self.evaluation else ()):
            yield ("evaluation", "panel", i), entry

    def temperatures(self) -> Iterator[tuple[tuple[str | int, ...], float]]:
        """The key and the value of each temperature at which completions are sampled."""
        yield ("rollout", "temperature"), self.rollout.temperature
        for path, table in self.decodings():
            for decoding, settings in table.items():
                yield (*path, decoding, "temperature"), settings.temperature

    def decodings(self) -> Iterator[tuple[tuple[str | int, ...], Table[Decoding]]]:
        """The path and the value of each table of decodings."""
        for name, suite in self.suites.items():
            yield ("evaluation", "suites", name, "decoding"), suite.decoding
        for path, entry in self.panel_entries():
            if not isinstance(entry, LmEvalTasks):
                yield (*path, "decoding"), entry.decoding

    def user_files(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The key and the value of each path of a user's Python file."""
        for name, term in self.losses.items():
            if isinstance(term, Distillation) and isinstance(term.divergence, FileDivergence):
                yield ("losses", name, "divergence", "file"), term.divergence.file
            if isinstance(term.token_weight, FileWeight):
                yield ("losses", name, "weight", "file"), term.token_weight.file
        for name, reward in self.rewards.items():
            if isinstance(reward, FileReward):
                yield ("rewards", name, "file"), reward.file
        with_files = FileEnvironment, ToolsEnvironment, GymnasiumEnvironment
        for path, environment in environments_of(self.environment, *with_files):
            if environment.file:
                yield (*path, "file"), environment.file

    def model_paths(self) -> Iterator[str]:
        """The paths of every model that this process loads: the student's, teachers', reward models'."""
        yield self.model.path
        yield from (weights.path for _, weights in self.other_models())
        yield from (reward.path for reward in self.rewards.values() if isinstance(reward, RewardModel))

    @property
    def has_frozen_models(self) -> bool:
        """Whether models with fixed weights are stored beside the student."""
        frozen_weights = any(isinstance(weights, FrozenWeights) for _, weights in self.teachers())
        return any(self.other_models()) or (self.model.lora is None and (frozen_weights or self.needs_reference))

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether a term needs the log-probabilities of its tokens before the first of several updates on a batch."""
        has_ratio = any(term.uses_old_logprobs for term in self.losses.values())
        return self.training.updates_per_rollout > 1 and has_ratio


def indivisible(spec: ExperimentSpec, ranks: int) -> str | None:
    """Why the prompts of a step cannot be split evenly over the ranks; None if they can."""
    size = spec.training.prompts_per_step
    if size % ranks == 0:
        return None
    return f"prompts_per_step is {size}, which {ranks} ranks cannot share equally"
