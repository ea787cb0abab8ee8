"""Rollouts: who samples, and what the samples may be used for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import Path, counted, did_you_mean, outside, shorten
from sdkit.language.rules.base import Context, Finding, adds_no_view, method_rule, run_rule, slots, terms


@method_rule("sampled-token estimates and importance ratios use the student's samples")
def off_policy_samples(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The sampled-token estimate and both importance ratios assume tokens drawn from the student; completions
    from a data set or a teacher follow another distribution.  A log of the student's own answers (`drawn_by:
    student`) has no log-probabilities from its sampler.
    """
    kind = spec.rollout.sampled_by.kind
    if isinstance(spec.rollout.sampled_by, specs.StudentSamples):
        return
    if spec.rollout.sampled_by.is_on_policy:
        for path, term in terms(spec, specs.Distillation, specs.PolicyGradient):
            if term.importance.sampler:
                message = "a log of answers holds no log-probabilities of its sampler"
                yield (*path, "importance", "sampler"), message, "set sampler: null"
        return
    for path, term in terms(spec, specs.Distillation):
        hint = "use sampled_by: student"
        if isinstance(term.support, specs.SampledTokenSupport):
            yield (*path, "support"), f"sampled_token needs the student's samples, but sampled_by is {kind}", hint
        for name in ("old_policy", "sampler"):
            if getattr(term.importance, name):
                message = f"importance.{name} needs the student's samples, but sampled_by is {kind}"
                yield (*path, "importance", name), message, f"set {name}: null, or {hint}"


@method_rule("a data set has one completion per prompt")
def dataset_group(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Each row holds one completion; a larger group would repeat it."""
    count = spec.rollout.completions_per_prompt
    if spec.rollout.sampled_by.completion_column and count > 1:
        message = f"completions_per_prompt is {count}, but each row holds one completion"
        yield ("rollout", "completions_per_prompt"), message, "use completions_per_prompt: 1"


@method_rule("a teacher that samples differs from the student")
def teacher_samples(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Sampling under the teacher's prompt needs a context that makes one.  The student's weights under the
    student's prompt are `sampled_by: student`.
    """
    by = spec.rollout.sampled_by
    if not isinstance(by, specs.TeacherSamples) or not spec.teacher:
        return
    path = ("rollout", "sampled_by")
    if by.weights == "student" and by.prompt == "student":
        yield path, "weights and prompt are both the student's: then the student samples", "use sampled_by: student"
    elif by.prompt == "teacher" and adds_no_view(spec.sees):
        message = f"{context.stated((*path, 'prompt'), 'teacher')}, but the teacher sees no context"
        yield (*path, "prompt"), message, "give the teacher sees: …, or set prompt: student"


@run_rule("several updates per rollout batch are corrected for", "warning")
def stale_rollouts(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """From the second update on, the samples come from older weights.  The ratio to the old policy corrects
    for this.
    """
    updates = spec.training.updates_per_rollout
    if updates == 1 or not spec.rollout.sampled_by.is_on_policy:
        return
    for path, term in terms(spec, specs.Distillation):
        if not term.importance.old_policy:
            message = (
                f"updates_per_rollout is {updates}, but no ratio to the old policy corrects term {shorten(path[-1])}"
            )
            hint = f"add {'.'.join(map(str, path))}.importance.old_policy: {{cap: 2}}"
            yield ("training", "updates_per_rollout"), message, hint


@run_rule("each update of a rollout batch has a prompt")
def updates_exceed_prompts(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A rollout batch is split over its updates by prompt, so that groups stay together."""
    updates, prompts = spec.training.updates_per_rollout, spec.training.prompts_per_step
    if updates > prompts:
        message = f"updates_per_rollout is {updates}, but a batch has {counted(prompts, 'prompt')}"
        yield ("training", "updates_per_rollout"), message, None


@run_rule("recorded rollouts exist")
def replay_run(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The replay backend reads rollouts recorded by an earlier run."""
    backend = spec.rollout.backend
    if isinstance(backend, specs.ReplayBackend):
        folder = context.file(backend.run)
        if not os.path.isdir(os.path.join(folder, "rollouts")):
            what = "has no rollouts folder" if os.path.isdir(folder) else "does not exist"
            yield ("rollout", "backend", "run"), f"run directory {backend.run} {what}", None


def _slots(spec: specs.MethodSpec) -> list[tuple[Path, specs.OfRollouts]]:
    """The slots of the teacher's context that are filled from rollouts, with their paths."""
    return [(path, slot) for path, slot in slots(spec, object) if isinstance(slot, specs.OfRollouts)]


@method_rule("successful_sibling needs several completions per prompt")
def lone_sibling(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A sibling is another rollout of the same prompt; in a group of one there is none."""
    count = spec.rollout.completions_per_prompt
    for path, slot in slots(spec, specs.SuccessfulSibling):
        if slot.exclude_self and count == 1:
            group = context.stated(("rollout", "completions_per_prompt"), 1)
            yield path, f"there are no siblings: {group}", "set rollout.completions_per_prompt to 2 or more"


@method_rule("non_constant_group needs several completions per prompt")
def lone_group(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """In a group of one all rewards are equal, so the filter would keep nothing."""
    for i, filter in enumerate(spec.rollout.keep):
        if isinstance(filter, specs.NonConstantGroup) and spec.rollout.completions_per_prompt == 1:
            group = context.stated(("rollout", "completions_per_prompt"), 1)
            hint = "set rollout.completions_per_prompt to 2 or more"
            yield ("rollout", "keep", i), f"{group}, so every group is constant and nothing is kept", hint


@method_rule("a teacher that samples has a context known before sampling")
def context_before_rollouts(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The teacher cannot sample from a prompt that contains the samples."""
    if spec.rollout.sampled_by.uses_teacher_prompt:
        for path, slot in _slots(spec):
            message = f"{slot.kind} is known after sampling, but the teacher's prompt is sampled from"
            yield path, message, "use sampled_by: student"


@run_rule("the training reward is unambiguous")
def training_reward(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Successful siblings, feedback, advantages, routes, filters and pass-rate weights all use one reward.  With
    several rewards, the key `reward` names it.
    """
    if spec.reward is not None and spec.reward not in spec.rewards:
        hint = did_you_mean(spec.reward, spec.rewards) or "declare it under rewards"
        yield ("reward",), f"{shorten(spec.reward)} {outside(spec.rewards)}", hint
    needed = next(reward_users(spec), None)
    if needed and spec.reward is None and len(spec.rewards) != 1:
        count = "there are none" if not spec.rewards else f"there are {len(spec.rewards)}"
        hint = f"add reward: {next(iter(spec.rewards))}" if spec.rewards else "declare one under rewards"
        yield needed, f"this needs the reward that training uses, and {count}", hint


def reward_users(spec: specs.MethodSpec) -> Iterator[Path]:
    """The paths of the settings that need the reward of training."""
    free = specs.NextTurns | specs.Written
    yield from (p for p, slot in _slots(spec) if not isinstance(slot, free) and not specs.is_by_turn(slot))
    for path, term in terms(spec, specs.PolicyGradient):
        if term.advantage.group_relative:
            yield (*path, "advantage")
    for name, term in spec.losses.items():
        if term.token_weight and (setting := term.token_weight.reward_setting):
            yield ("losses", name, *setting)
    if spec.route:
        yield ("route",)
    yield from (("rollout", "keep", i) for i, filter in enumerate(spec.rollout.keep) if filter.needs_reward)
