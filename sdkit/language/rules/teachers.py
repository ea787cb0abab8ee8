"""The teacher's weights: other models, blends, routes, and which of them can sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as Folder

from sdkit.language import specs
from sdkit.language.errors import did_you_mean, outside, shorten, spelled
from sdkit.language.rules.base import (
    Context,
    Finding,
    adds_no_view,
    columns_of,
    data_of,
    method_rule,
    no_model,
    run_rule,
    unknown_bundled,
)
from sdkit.language.vocabulary import first_difference, of_folder


@run_rule("an external teacher or a blend's base is a model")
def teacher_model(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A path is `bundled:NAME` with a name from the list of bundled models, a local Hugging Face folder with a
    config.json, or a hub id.
    """
    for path, weights in spec.other_models():
        where = (*path, "path")
        yield from unknown_bundled(where, weights.path)
        yield from no_model(where, weights.path, context)
    for path, weights in spec.served_teachers():
        yield from unknown_bundled((*path, "tokenizer"), weights.tokenizer or "")


@run_rule("an external teacher or a blend's base has the student's vocabulary")
def teacher_vocabulary(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Distributions are compared token id by token id, so every token must have the same id in both models.
    Models without a local folder are compared by tokenizer before any weights are loaded.
    """
    ours = of_folder(Folder(context.file(spec.model.path)))
    folders = [((*path, "path"), weights.path) for path, weights in spec.other_models()]
    folders += [((*path, "tokenizer"), w.tokenizer or "") for path, w in spec.served_teachers()]
    for where, folder in folders:
        theirs = of_folder(Folder(context.file(folder))) if folder else None
        if ours is None or theirs is None:
            continue
        if difference := first_difference(ours, theirs):
            message = f"another vocabulary than the student's: {difference}"
            yield where, message, "take a model with the student's tokenizer"


@method_rule("vLLM samples from the student's architecture")
def foreign_sampler(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The vLLM engine is built for the student's model and loads weights of that shape.  Another model samples
    with transformers' `generate`.
    """
    if not spec.rollout.sampled_by.uses_teacher_weights or not spec.teacher:
        return
    if isinstance(spec.teacher.weights, specs.ExternalWeights) and isinstance(spec.rollout.backend, specs.VllmEngine):
        message = "vLLM holds the student's model, so it cannot sample from an external teacher"
        yield ("rollout", "backend"), message, "use backend: transformers"


@method_rule("a teacher that samples is a single model")
def no_sampler(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A completion is sampled token by token from one set of weights in this process.  A blend would need two
    models, or two prompts, at every token.
    """
    if not spec.rollout.sampled_by.uses_teacher_weights or not spec.teacher:
        return
    if reason := spec.teacher.weights.cannot_sample:
        yield ("rollout", "sampled_by"), reason, "use sampled_by: student"
    elif spec.blend:
        message = "a blended teacher is a product of distributions and does not sample"
        yield ("rollout", "sampled_by"), message, "use sampled_by: student, or remove the blend"


@method_rule("a teacher is not blended with itself")
def blend_with_itself(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Except in a product, the powers of a blend sum to one.  Blending the same weights under the same prompt
    gives the same distribution at the cost of a forward pass.
    """
    if not spec.blend or not spec.blend.sums_to_one:
        return
    same_prompt = spec.blend.partner_prompt == "teacher" or adds_no_view(spec.sees)
    partner = spec.blend.base or specs.StudentWeights()
    if same_prompt and all(weights == partner for _, weights in spec.teachers()):
        yield ("teacher", "blend"), "the teacher is blended with itself", "remove blend"


@run_rule("a routed teacher's column is in the data")
def route_column(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The column names each row's teacher, in the training rows and in suites that measure the loss.  Its values
    are compared with the routes when the data is read.
    """
    weights = spec.teacher and spec.teacher.weights
    if not isinstance(weights, specs.RoutedWeights):
        return
    for path, data in data_of(spec):
        known = columns_of(spec, data)
        if weights.by not in known:
            where = "" if path == ("data",) else f" for {spelled(path)}"
            hint = did_you_mean(weights.by, known) or f"add {spelled(path)}.columns.{weights.by}"
            yield ("teacher", "weights", "by"), f"column {shorten(weights.by)} {outside(known)}{where}", hint
            return
