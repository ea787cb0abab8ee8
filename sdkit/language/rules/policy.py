"""Rules on rewards as advantages, on whose samples a gradient may be estimated from, and on the reference."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import Path, shorten, spelled
from sdkit.language.rules.base import Context, Finding, k2_terms, method_rule, policy_gradients
from sdkit.language.specs import (
    GroupRelative,
    MethodSpec,
    PolicyGradient,
    TeacherSamples,
    drawn_by_student,
    reward_part,
)


@method_rule("rewards are compared within a group")
def lone_advantage(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """In a group of one the reward is its own mean and has no spread: every advantage is zero."""
    for path, term in policy_gradients(spec):
        part = reward_part(term.advantage)
        if not part or spec.rollout.completions_per_prompt > 1:
            continue
        for key, value in (("baseline", "group_mean"), ("scale", "group_std")):
            if getattr(part, key) == value:
                group = context.stated(("rollout", "completions_per_prompt"), 1)
                hint = "set rollout.completions_per_prompt to 2 or more"
                yield (
                    (*path, *_of_reward(term), key),
                    f"{group}, so every advantage of the reward is 0",
                    hint,
                )
                break


def _of_reward(term: PolicyGradient) -> Path:
    """The keys below a term where its advantage of the reward is written."""
    whole = isinstance(term.advantage, GroupRelative)
    return ("advantage",) if whole else ("advantage", "group_relative")


@method_rule("terms share one advantage of the reward")
def advantages_differ(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A rollout has one advantage, computed once from its group's rewards."""
    asked = [
        ((*path, *_of_reward(term)), part)
        for path, term in policy_gradients(spec)
        if (part := reward_part(term.advantage))
    ]
    for path, advantage in asked[1:]:
        if advantage != asked[0][1]:
            first = shorten(asked[0][0][1])
            yield path, f"this advantage differs from that of term {first}", "give both the same"


@method_rule("what is estimated from the student's samples has them")
def off_policy_gradient(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A policy gradient and the k2 estimator speak of tokens that the student drew.  Where a teacher
    drew them, the ratio to its log-probabilities (importance.sampler) makes the gradient right; a
    data set has none.
    """
    by = spec.rollout.sampled_by
    if drawn_by_student(by):
        return
    hint = "use sampled_by: student"
    for path, term in policy_gradients(spec):
        if not isinstance(by, TeacherSamples) or not term.importance.sampler:
            add = f", or add {spelled(path)}.importance.sampler"
            more = add if isinstance(by, TeacherSamples) else ""
            message = f"a policy gradient needs the student's samples, but sampled_by is {by.kind}"
            yield (*path, "kind"), message, hint + more
    for path in k2_terms(spec):
        message = f"k2 needs the student's samples, but sampled_by is {by.kind}"
        yield (*path, "estimator"), message, "use estimator: vocabulary"


@method_rule("an overlong completion is longer than others")
def overlong_stretch(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The penalty grows over the last `stretch` tokens before the longest completion; where these are
    all, every completion is punished, the short ones too.
    """
    longest = spec.rollout.max_new_tokens
    for path, term in policy_gradients(spec):
        part = reward_part(term.advantage)
        if part and part.overlong and part.overlong.stretch >= longest:
            said = context.stated(("rollout", "max_new_tokens"), longest)
            message = f"stretch is {part.overlong.stretch}, but {said}: no completion goes free"
            yield (*path, *_of_reward(term), "overlong", "stretch"), message, "lower stretch"


RULES = (lone_advantage, advantages_differ, off_policy_gradient, overlong_stretch)
