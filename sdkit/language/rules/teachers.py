"""Rules on what the teacher is: other models, and what can be asked of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as Folder

from sdkit.language.errors import outside, shorten, spelled
from sdkit.language.rules.base import (
    Context,
    Finding,
    adds_no_view,
    columns_of,
    data_of,
    did_you_mean,
    method_rule,
    no_model,
    run_rule,
    unknown_bundled,
)
from sdkit.language.specs import (
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    GeometricBlend,
    MethodSpec,
    RoutedWeights,
    ServedWeights,
    StudentWeights,
    TeacherSamples,
    TrustRegionBlend,
    VllmEngine,
    blend_base,
    other_models,
    served_teachers,
    teachers_of,
)
from sdkit.language.vocabulary import first_difference, of_folder


@run_rule("an external teacher, or the base of a blend, is a model")
def teacher_model(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A local path is a Hugging Face folder, which has a config.json; `bundled:NAME` is in a short
    list; anything else is a hub id.
    """
    for path, weights in other_models(spec):
        where = (*path, "path")
        yield from unknown_bundled(where, weights.path)
        yield from no_model(where, weights.path, context)
    for path, weights in served_teachers(spec):
        yield from unknown_bundled((*path, "tokenizer"), weights.tokenizer or "")


@run_rule("an external teacher, or the base of a blend, has the student's vocabulary")
def teacher_vocabulary(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Distributions are compared id by id, so every token must have the same id on both sides.  Where
    a folder cannot tell, the tokenizers are compared before any weights are loaded.
    """
    ours = of_folder(Folder(context.file(spec.model.path)))
    folders = [((*path, "path"), weights.path) for path, weights in other_models(spec)]
    folders += [((*path, "tokenizer"), w.tokenizer or "") for path, w in served_teachers(spec)]
    for where, folder in folders:
        theirs = of_folder(Folder(context.file(folder))) if folder else None
        if ours is None or theirs is None:
            continue
        if difference := first_difference(ours, theirs):
            message = f"another vocabulary than the student's: {difference}"
            yield where, message, "take a model with the student's tokenizer"


@method_rule("vLLM samples under the student's architecture")
def foreign_sampler(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """An engine holds the student's model and takes weights of that shape; another model samples by `generate`."""
    by, backend = spec.rollout.sampled_by, spec.rollout.backend
    if not isinstance(by, TeacherSamples) or by.weights != "teacher" or not spec.teacher:
        return
    if isinstance(spec.teacher.weights, ExternalWeights) and isinstance(backend, VllmEngine):
        message = "vLLM holds the student's model, so it cannot sample from an external teacher"
        yield ("rollout", "backend"), message, "use backend: transformers"


@method_rule("the teacher that samples is one model")
def no_sampler(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A completion is drawn token by token from one set of weights in this process; a blend takes two
    models, or two prompts, at each of them.
    """
    by = spec.rollout.sampled_by
    if not isinstance(by, TeacherSamples) or by.weights != "teacher" or not spec.teacher:
        return
    reasons = {
        RoutedWeights: "a routed teacher is several models and does not sample",
        ServedWeights: "a served teacher is asked about completions and does not sample",
    }
    if reason := reasons.get(type(spec.teacher.weights)):
        yield ("rollout", "sampled_by"), reason, "use sampled_by: student"
    elif spec.teacher.blend:
        message = "a blended teacher is a product of distributions and does not sample"
        yield ("rollout", "sampled_by"), message, "use sampled_by: student, or remove the blend"


@method_rule("a teacher is blended with something else than itself")
def blend_with_itself(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The powers of all blends but a product sum to one: the same weights under the same prompt give
    the same distribution again, and cost a forward pass.
    """
    teacher = spec.teacher
    match teacher and teacher.blend:
        case TrustRegionBlend():
            same = StudentWeights()  # both under the teacher's prompt
        case GeometricBlend() | ExtrapolateBlend() if teacher and adds_no_view(teacher.sees):
            same = blend_base(spec)
        case _:
            return
    if all(weights == same for _, weights in teachers_of(spec)):
        yield ("teacher", "blend"), "the teacher is blended with itself", "remove blend"


@run_rule("a routed teacher's column is in the data")
def route_column(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The rows say who teaches them, the training rows and those on which the loss is measured; their
    values are compared with the routes when the data are read.
    """
    weights = spec.teacher and spec.teacher.weights
    if not isinstance(weights, RoutedWeights):
        return
    for path, data in data_of(spec):
        known = columns_of(spec, data)
        if weights.by not in known:
            where = "" if path == ("data",) else f" for {spelled(path)}"
            message = f"column {shorten(weights.by)} {outside(known)}{where}"
            hint = did_you_mean(weights.by, known) or f"add {spelled(path)}.columns.{weights.by}"
            yield ("teacher", "weights", "by"), message, hint
            return


RULES = (
    teacher_model,
    teacher_vocabulary,
    foreign_sampler,
    no_sampler,
    blend_with_itself,
    route_column,
)
