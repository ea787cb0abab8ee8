"""Rules on who samples, and on what the samples may be used for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sdkit.problems import counted, shorten
from sdkit.rules.base import Context, Finding, distillations, method_rule, run_rule
from sdkit.specs import (
    DatasetSamples,
    ExperimentSpec,
    MethodSpec,
    ReplayBackend,
    SampledTokenSupport,
    StudentSamples,
    TeacherSamples,
)


@method_rule("what needs the student's own samples has them")
def off_policy_samples(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The sampled-token estimate and both importance ratios are about tokens that the student
    drew; completions of a data set or of a teacher follow another distribution.
    """
    kind = spec.rollout.sampled_by.kind
    if isinstance(spec.rollout.sampled_by, StudentSamples):
        return
    for path, term in distillations(spec):
        hint = "use sampled_by: student"
        if isinstance(term.support, SampledTokenSupport):
            message = f"sampled_token needs the student's samples, but sampled_by is {kind}"
            yield (*path, "support"), message, hint
        for name in ("old_policy", "sampler"):
            if getattr(term.importance, name):
                message = f"importance.{name} needs the student's samples, but sampled_by is {kind}"
                yield (*path, "importance", name), message, f"set {name}: null, or {hint}"


@method_rule("a data set has one completion a prompt")
def dataset_group(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A row holds one completion; a group would repeat it."""
    count = spec.rollout.completions_per_prompt
    if isinstance(spec.rollout.sampled_by, DatasetSamples) and count > 1:
        message = f"completions_per_prompt is {count}, but each row holds one completion"
        yield ("rollout", "completions_per_prompt"), message, "use completions_per_prompt: 1"


@method_rule("a teacher that samples differs from the student")
def teacher_samples(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Sampling under the teacher's prompt needs such a prompt; with the student's weights and
    prompt it is the student who samples.
    """
    by = spec.rollout.sampled_by
    if not isinstance(by, TeacherSamples) or not spec.teacher:
        return
    path = ("rollout", "sampled_by")
    if by.weights == "student" and by.prompt == "student":
        message = "weights and prompt are both the student's: then the student samples"
        yield path, message, "use sampled_by: student"
    elif by.prompt == "teacher" and not spec.teacher.sees:
        message = f"{context.stated((*path, 'prompt'), 'teacher')}, but the teacher sees no context"
        yield (*path, "prompt"), message, "give the teacher sees: …, or set prompt: student"


@run_rule("several updates on a batch are corrected for", "warning")
def stale_rollouts(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """From the second update on, the samples come from weights that are gone; the ratio to the old
    policy corrects for it.
    """
    updates = spec.training.updates_per_rollout
    if updates == 1 or not isinstance(spec.rollout.sampled_by, StudentSamples):
        return
    for path, term in distillations(spec):
        if not term.importance.old_policy:
            message = f"updates_per_rollout is {updates}, but no ratio to the old policy corrects term {shorten(path[-1])}"
            hint = f"add {'.'.join(map(str, path))}.importance.old_policy: {{cap: 2}}"
            yield ("training", "updates_per_rollout"), message, hint


@run_rule("every update of a batch has a prompt")
def updates_exceed_prompts(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A rollout batch is split by prompts, so that groups stay whole."""
    updates, prompts = spec.training.updates_per_rollout, spec.training.prompts_per_step
    if updates > prompts:
        message = f"updates_per_rollout is {updates}, but a batch has {counted(prompts, 'prompt')}"
        yield ("training", "updates_per_rollout"), message, None


@run_rule("recorded rollouts are there")
def replay_run(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The replay backend reads the rollouts that an earlier run recorded."""
    backend = spec.rollout.backend
    if isinstance(backend, ReplayBackend):
        folder = context.file(backend.run)
        if not os.path.isdir(os.path.join(folder, "rollouts")):
            what = "has no rollouts folder" if os.path.isdir(folder) else "does not exist"
            yield ("rollout", "backend", "run"), f"run directory {backend.run} {what}", None


RULES = (
    off_policy_samples,
    dataset_group,
    teacher_samples,
    stale_rollouts,
    updates_exceed_prompts,
    replay_run,
)
