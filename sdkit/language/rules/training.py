"""Model, run length, batch sizes, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path as Folder
from typing import Any

from sdkit.language.best_metric import best_metrics
from sdkit.language.errors import Path, did_you_mean, outside, shorten
from sdkit.language.files import MAX_CONFIG_BYTES, read_json_object
from sdkit.language.rules.base import (
    IS_QUANTIZED,
    UNQUANTIZED,
    Context,
    Finding,
    method_rule,
    no_model,
    not_plain,
    run_rule,
    shape_of,
    total_updates,
    unknown_bundled,
)
from sdkit.language.specs import CopyWeights, DatasetSamples, ExperimentSpec, MethodSpec, indivisible


@method_rule("names are plain")
def plain_name(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Names of terms, slots, rewards, suites and decodings appear in metric names, file names and overrides."""
    tables: dict[Path, Mapping[str, Any]] = {("losses",): spec.losses, ("teacher", "sees", "slots"): spec.slots}
    if spec.writer:
        tables["teacher", "sees", "writer", "slots"] = spec.writer.slots
    if isinstance(spec, ExperimentSpec):
        tables["rewards",] = spec.rewards
        tables["evaluation", "suites"] = spec.suites
        tables |= dict(spec.decodings())
    for path, table in tables.items():
        for name in table:
            yield from not_plain((*path, name), name)


@run_rule("a bundled model exists")
def bundled_name(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Bundled models come as Python packages; only the names in sdkit's list exist."""
    yield from unknown_bundled(("model", "path"), spec.model.path)


@run_rule("a local model folder contains a model")
def model_folder(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A local path is a Hugging Face model folder with a config.json; anything else is a hub id.  Weights that are stored
    quantized cannot be trained: sdkit quantizes the original ones itself.
    """
    path = spec.model.path
    yield from no_model(("model", "path"), path, context)
    config = read_json_object(Folder(context.file(path), "config.json"), MAX_CONFIG_BYTES)
    if config and config.get("quantization_config"):
        yield ("model", "path"), f"folder {path} {IS_QUANTIZED}", UNQUANTIZED


@run_rule("a run has a length")
def steps_or_epochs(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`steps` counts rollout batches, `epochs` counts passes over the data; give one, and sdkit derives the other."""
    steps, epochs = spec.training.steps, spec.training.epochs
    if steps is None and epochs is None:
        yield ("training", "steps"), "neither steps nor epochs is given", "add training.steps"
    elif steps is not None and epochs is not None:
        yield ("training", "epochs"), "both steps and epochs are given", "remove one"


@run_rule("the warm-up ends within the run")
def warmup(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Otherwise the run never reaches its peak learning rate."""
    total = total_updates(spec)
    if total and spec.optimizer.warmup_steps >= total:
        message = f"warmup_steps is {spec.optimizer.warmup_steps}, but the run has {total} optimizer steps"
        yield ("optimizer", "warmup_steps"), message, None


@run_rule("sequences fit the model's context")
def context_length(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Prompt and completion form one sequence, for the student and for the teacher."""
    shape, rollout = shape_of(spec, context), spec.rollout
    if not shape:
        return
    new = spec.longest_completion()
    longest: list[tuple[Path, int, int]] = [(("rollout",), rollout.max_prompt_tokens or 0, new)]
    if spec.sees:
        longest.append((("teacher", "sees"), spec.sees.max_prompt_tokens or 0, new))
    for path, _, suite in spec.placed_suites():
        if suite.max_new_tokens:
            new = spec.longest_completion(suite.max_new_tokens) if path[1] == "suites" else suite.max_new_tokens
            longest.append(((*path, "max_new_tokens"), rollout.max_prompt_tokens or 0, new))
    for path, prompt, new in longest:
        if prompt + new > shape.max_position_embeddings and (prompt or path[0] != "teacher"):
            key = "max_prompt_tokens" if prompt else "max_new_tokens"
            culprit = path if path[0] == "evaluation" else (*path, key)
            message = (
                f"{prompt} prompt and {new} new tokens exceed the model's context of {shape.max_position_embeddings}"
            )
            yield culprit, message, "lower max_new_tokens or max_prompt_tokens"


@run_rule("the dtype suits flash_attention_2")
def flash_dtype(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The kernel has no float32 form.  External models use the student's attention implementation."""
    if spec.model.attn_implementation != "flash_attention_2":
        return
    models = [(("model",), spec.model), *spec.other_models()]
    for path, model in models:
        if model.dtype != "bfloat16":
            stated = context.stated((*path, "dtype"), model.dtype)
            yield (*path, "dtype"), f"{stated}, but flash_attention_2 needs bfloat16", "use sdpa, or dtype: bfloat16"


@run_rule("every rank gets the same number of prompts")
def equal_shares(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Ranks run in lockstep, and the rollouts of a group stay on one rank.  The number of ranks that a launcher
    starts is checked at start-up.
    """
    ranks = spec.machine.ranks if spec.machine else 1
    if fault := indivisible(spec, ranks):
        yield ("training", "prompts_per_step"), fault, f"use a multiple of {ranks}"


@run_rule("offloading has the ZeRO stage it needs")
def offload_stage(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """DeepSpeed offloads a rank's shard: optimizer states from stage 1 on, parameters under stage 3.  Frozen models are
    offloaded as a whole, so under stage 3, which shards them, `parameters` offloads them too.
    """
    stage = spec.training.zero_stage
    needed = {"optimizer": 1, "parameters": 3, "frozen_models": 0}
    for place, what in enumerate(spec.training.offload):
        path, stated = ("training", "offload", place), context.stated(("training", "zero_stage"), stage)
        if stage < needed[what]:
            hint = f"use zero_stage: {needed[what]}" + (" or more" if needed[what] < 3 else "")
            yield path, f"{what} cannot be offloaded: {stated}", hint
        elif what == "frozen_models" and stage == 3:
            yield path, f"frozen_models cannot be offloaded as a whole: {stated}", "use offload: [parameters]"
        elif what == "frozen_models" and not spec.has_frozen_models:
            yield path, "the run stores no model with fixed weights beside the student", "remove frozen_models"


@run_rule("quantized weights are not sharded")
def quantized_base_stage(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Stage 3 cuts each parameter into equal shards, but a weight in 4 bits belongs to scales of its own.  Under stages 0 to 2
    every rank has the frozen weights as a whole, in a quarter of the memory of bfloat16.
    """
    path = ("training", "zero_stage")
    if spec.model.quantized and spec.training.zero_stage == 3:
        stated = context.stated(path, 3)
        message = f"the base weights cannot be quantized: {stated}"
        yield ("model", "lora", "quantize_base"), message, "use zero_stage: 2 or less"


@run_rule("the longest sequence fits one forward pass")
def micro_batch(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A sequence is never split across forward passes."""
    budget, new = spec.training.micro_batch_tokens, spec.longest_completion()
    prompt = spec.rollout.max_prompt_tokens
    need = new + (prompt or 1)
    if budget < need:
        path = ("training", "micro_batch_tokens")
        parts = f"max_prompt_tokens {prompt}" if prompt else "a prompt"
        what = "the longest trajectory," if spec.environment else "max_new_tokens"
        message = f"{context.stated(path, budget)}, less than one sequence: {parts} and {what} {new}"
        yield path, message, f"use micro_batch_tokens: {need} or more"


@run_rule("keep_best has an evaluation to compare")
def best_of_nothing(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The best model is chosen by an evaluated score, loss or measure."""
    which, path = spec.output.keep_best, ("output", "keep_best")
    if which is None:
        return
    if spec.evaluation is None:
        yield path, f"keep_best is {shorten(which)}, but nothing is evaluated", "add evaluation.suites"
        return
    name = next(iter(spec.evaluation.suites))
    known = best_metrics(spec)
    if which == "loss" and which not in known:
        message = f"keep_best is loss, but suite {shorten(name)} measures none"
        yield path, message, f"set evaluation.suites.{name}.loss_prompts, or keep_best: score"
    elif which not in known:
        start = which.rpartition("/")[0] + "/"
        beside = [metric for metric in known if "/" in which and metric.startswith(start)]
        general = [metric.rpartition("/")[0] + "/NAME" if "/" in metric else metric for metric in known]
        choices = beside or list(dict.fromkeys(general))
        yield path, f"{shorten(which)} {outside(choices)}", did_you_mean(which, list(known))


@run_rule("it is clear which value of keep_best is better")
def better_value(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Whether a long or a varied completion is better depends on the task."""
    which, better = spec.output.keep_best, spec.output.best_is
    if which is None:
        if better is not None:
            yield ("output", "best_is"), "best_is has no effect without keep_best", "add keep_best"
        return
    known = best_metrics(spec)
    if which in known and known[which] is None and better is None:
        message = f"whether a higher or a lower {shorten(which)} is better depends on the task"
        yield ("output", "keep_best"), message, "add best_is: higher, or best_is: lower"


@run_rule("intervals are no longer than the run", "warning")
def beyond_run(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """With an interval longer than the run, the action never happens, or only at the end."""
    steps, total = spec.training.steps, total_updates(spec)
    if not steps or not total:
        return
    intervals: list[tuple[Path, int | None, int]] = [
        (("output", "checkpoint_every"), spec.output.checkpoint_every, steps)
    ]
    if spec.evaluation:
        intervals.append((("evaluation", "every"), spec.evaluation.every, steps))
        intervals.append((("evaluation", "panel_every"), spec.evaluation.panel_every, steps))
    for path, weights in spec.teachers():
        if isinstance(weights, CopyWeights):
            intervals.append(((*path, "every"), weights.every, total))
    for path, every, length in intervals:
        if every and every > length:
            yield path, f"{path[-1]} is {every}, but the run has {length} steps", None


@run_rule("written tripwires for a collapse can go off", "warning")
def silent_tripwire(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A tripwire that a run relies on, and that never goes off, is worse than none."""
    path: Path = ("output", "collapse")
    if spec.output.tripwire_steps is None and context.loaded.written(path):
        yield path, "collapse has no effect: tripwire_steps is null", "set tripwire_steps: 5"
        return
    if context.loaded.written((*path, "entropy")) and isinstance(spec.rollout.sampled_by, DatasetSamples):
        yield (*path, "entropy"), "collapse.entropy has no effect: the data set has the completions", "remove it"
    wire, evaluation = spec.output.collapse.score, spec.evaluation
    if wire is None or not context.loaded.written((*path, "score")):
        return
    if evaluation is None:
        yield (*path, "score"), "collapse.score has no effect: nothing is evaluated", "add evaluation.suites"
    elif not evaluation.every:
        message = "collapse.score cannot stop the run: only its start and its end are evaluated"
        yield (*path, "score"), message, "add evaluation.every"


@run_rule("written settings have an effect", "warning")
def unused_setting(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A setting without effect points to a misunderstanding that the run itself would not reveal."""
    path: Path = ("teacher", "sees", "cut")
    sees = spec.sees
    if sees and context.loaded.written(path) and sees.max_prompt_tokens is None:
        yield path, "cut has no effect without max_prompt_tokens", "add max_prompt_tokens"
    path = ("training", "share_prompts")
    if context.loaded.written(path) and spec.training.share_prompts:
        if spec.model.attn_implementation == "flash_attention_2":
            yield path, "share_prompts has no effect: flash_attention_2 takes no mask for shared rows", "use sdpa"
    path = ("output", "keep_checkpoints")
    if context.loaded.written(path) and not spec.output.checkpoint_every:
        yield path, "keep_checkpoints has no effect without checkpoint_every", "add checkpoint_every"
    if spec.optimizer.lr_scheduler_type == "constant" and spec.optimizer.final_share:
        schedule = context.stated(("optimizer", "lr_scheduler_type"), "constant")
        message = f"final_share has no effect: {schedule}"
        yield ("optimizer", "final_share"), message, "use lr_scheduler_type: linear or cosine"
    for path, decodings in spec.decodings():
        for name, decoding in decodings.items():
            if decoding.temperature == 0 and decoding.samples > 1:
                yield (*path, name, "samples"), "greedy samples (temperature 0) are all alike", "use samples: 1"
