"""Policy gradients: advantages from rewards, and whose samples they may use."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import shorten, spelled
from sdkit.language.rules.base import Context, Finding, k2_terms, method_rule, reward_advantages, terms
from sdkit.language.specs import MethodSpec, PolicyGradient, TeacherSamples


@method_rule("rewards are compared within a group")
def lone_advantage(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """In a group of one, the reward equals its mean and has no spread, so every advantage is zero."""
    if spec.rollout.completions_per_prompt > 1:
        return
    for path, part in reward_advantages(spec):
        for key, value in (("baseline", "group_mean"), ("scale", "group_std")):
            if getattr(part, key) == value:
                group = context.stated(("rollout", "completions_per_prompt"), 1)
                hint = "set rollout.completions_per_prompt to 2 or more"
                yield (*path, key), f"{group}, so every advantage of the reward is 0", hint
                break


@method_rule("all terms use the same reward advantage")
def advantages_differ(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Each rollout has one reward advantage, computed once from the rewards of its group."""
    advantages = list(reward_advantages(spec))
    for path, advantage in advantages[1:]:
        first_path, first = advantages[0]
        if advantage != first:
            yield path, f"this advantage differs from that of term {shorten(first_path[1])}", "give both the same"


@method_rule("policy gradients and k2 use the student's samples")
def off_policy_gradient(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Policy gradients and the k2 estimator assume tokens drawn from the student.  For tokens drawn from a
    teacher, the ratio to its log-probabilities (importance.sampler) corrects a policy gradient; a data set has
    no log-probabilities.
    """
    by = spec.rollout.sampled_by
    if by.is_on_policy:
        return
    hint = "use sampled_by: student"
    for path, term in terms(spec, PolicyGradient):
        if not isinstance(by, TeacherSamples) or not term.importance.sampler:
            ratio = f", or add {spelled(path)}.importance.sampler"
            alternative = ratio if isinstance(by, TeacherSamples) else ""
            message = f"a policy gradient needs the student's samples, but sampled_by is {by.kind}"
            yield (*path, "kind"), message, hint + alternative
    for path in k2_terms(spec):
        message = f"k2 needs the student's samples, but sampled_by is {by.kind}"
        yield (*path, "estimator"), message, "use estimator: vocabulary"


@method_rule("the overlong penalty spares short completions")
def overlong_stretch(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The penalty grows over the last `stretch` tokens before max_new_tokens.  If those are all tokens, even
    short completions are penalized.
    """
    longest = spec.rollout.max_new_tokens
    for path, part in reward_advantages(spec):
        if part.overlong and part.overlong.stretch >= longest:
            limit = context.stated(("rollout", "max_new_tokens"), longest)
            message = f"stretch is {part.overlong.stretch}, but {limit}: no completion goes free"
            yield (*path, "overlong", "stretch"), message, "lower stretch"
