"""Learning signal: nonzero gradients, and a teacher that differs from the student."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import shorten
from sdkit.language.rules.base import Context, Finding, adds_no_view, log_ratios, method_rule, of_teacher, terms


def has_weight(term: specs.LossSpec) -> bool:
    """Whether the term's coefficient is ever above 0."""
    return not specs.always(term.coefficient, 0)


@method_rule("some term has a nonzero coefficient")
def no_objective(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """If every coefficient is 0 throughout, the run trains nothing and still reports success."""
    if not any(map(has_weight, spec.losses.values())):
        path = ("losses", next(iter(spec.losses)), "coefficient")
        yield path, "every term has coefficient 0: there is nothing to train on", None


@method_rule("some term moves the student")
def nothing_pulls(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The student starts equal to the reference, where the KL and its gradient are zero.  Terms with
    coefficient 0 move nothing.
    """
    weighted = [term for term in spec.losses.values() if has_weight(term)]
    if weighted and all(isinstance(term, specs.ReferenceKl) for term in weighted):
        message = "reference_kl holds the student where it starts, and no other term pulls"
        idle = next((n for n, term in spec.losses.items() if not has_weight(term)), None)
        hint = "add another term" if idle is None else f"give term {shorten(idle)} a coefficient"
        yield ("losses",), message, hint


@method_rule("an advantage_add has a nonzero weight")
def zero_advantage(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """If both weights are 0, every advantage is 0, and so is the gradient."""
    for path, term in terms(spec, specs.PolicyGradient):
        advantage = term.advantage
        if (
            isinstance(advantage, specs.AdvantageAdd)
            and specs.always(advantage.group_weight, 0)
            and specs.always(advantage.log_ratio_weight, 0)
        ):
            message = "group_weight and log_ratio_weight are 0, so every advantage is 0"
            yield (*path, "advantage"), message, "give one of them a weight"


@method_rule("a centered log-ratio spans several tokens")
def centered_token(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The mean over a single token is that token's own log-ratio, so the difference is always 0."""
    longest = spec.rollout.max_new_tokens
    for path, term, part in log_ratios(spec):
        end = min(term.mask.prefix or longest, longest)
        if part.center == "sequence" and end - term.mask.skip_first == 1:
            message = "the term counts one token of a completion, so its centered log-ratio is always 0"
            yield (*path, "center"), message, "use center: none"


@method_rule("the filters keep the failures that a route needs")
def failures_not_kept(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """`route.then` counts rollouts with rewards below the route's threshold; a filter with the same or a higher
    threshold removes all of them.
    """
    if spec.route is None:
        return
    for index, filter in enumerate(spec.rollout.keep):
        if isinstance(filter, specs.RewardAtLeast) and filter.threshold >= spec.route.threshold:
            threshold = context.stated(("route", "threshold"), spec.route.threshold, "route.threshold")
            message = f"no failure is kept: {threshold}, so the terms of route.then count nothing"
            yield ("rollout", "keep", index, "threshold"), message, "lower this threshold, or remove the route"


@method_rule("the teacher's context can be filled")
def never_filled(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Feedback with `when: no_solution` is filled only where no successful sibling is shown, and a written slot only where
    the slot that `unless` names is empty.  `requires: all` asks for both at once, so no rollout would have a teacher prompt.
    """
    sees = spec.sees
    if not sees or sees.requires != "all":
        return
    siblings = [n for n, slot in sees.slots.items() if isinstance(slot, specs.SuccessfulSibling)]
    for name, slot in sees.slots.items():
        match slot:
            case specs.Feedback(when="no_solution") if siblings:
                key, other = "when", siblings[0]
            case specs.Written(unless=str(other)):
                key = "unless"
            case _:
                continue
        stated = context.stated(("teacher", "sees", "requires"), sees.requires)
        message = f"never filled together with slot {shorten(other)}, and {stated}"
        yield ("teacher", "sees", "slots", name, key), message, "use requires: any"


@method_rule("a blended teacher has a nonzero share")
def teacher_without_share(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A trust_region blend with student_share 1 is the live student alone, and a geometric blend with
    teacher_share 0 the start model alone: the teacher's weights are never used.
    """
    match spec.blend:
        case specs.TrustRegionBlend(student_share=share) if specs.always(share, 1):
            key, value, equivalent = "student_share", 1, "student"
        case specs.GeometricBlend(teacher_share=share) if specs.always(share, 0):
            key, value, equivalent = "teacher_share", 0, "frozen"
        case _:
            return
    message = f"{key} is always {value}: the teacher has no part in the blend"
    yield ("teacher", "blend", key), message, f"remove blend, or use weights: {equivalent}"


@method_rule("a live teacher sees more than the student")
def zero_signal(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The live student under the student's own prompt is the student itself: the loss and its gradient are
    zero.  A trust_region blend does not change that; other blends give a different distribution.  A context
    with no text and no slot besides the prompt is the same prompt.
    """
    live = (path for path, weights in spec.teachers() if isinstance(weights, specs.StudentWeights))
    where = next(live, None)
    if where and adds_no_view(spec.sees) and not (spec.blend and spec.blend.changes_student):
        for path, _ in of_teacher(spec):
            message = f"term {shorten(path[-1])} compares the live student with itself: always zero"
            yield where, message, f"{_to_see(spec.sees)}, or other weights"
            return


@method_rule("a teacher without context differs from the student at the start")
def same_at_start(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Live, frozen, averaged and copied weights all start equal to the student, and so do their blends, except
    a product, which is sharper.  Without context the first gradient is therefore zero, and unless another term
    moves the student, it stays zero.
    """
    if not spec.teacher or not adds_no_view(spec.sees):
        return
    blend = spec.blend if spec.blend and spec.blend.changes_student else None
    if blend and not blend.starts_as_student:
        return
    for _, weights in spec.teachers():
        # zero_signal reports the unblended live student.
        if weights.is_other_model or (weights == specs.StudentWeights() and not blend):
            return
    weighted = [term for term in spec.losses.values() if has_weight(term)]
    pulls = any(not isinstance(term, specs.ReferenceKl) for term in weighted)
    if pulls and all(isinstance(t, specs.ReferenceKl) or t.zero_when_equal for t in weighted):
        message = "the teacher starts as the student and sees the same: nothing to learn from"
        yield ("teacher",), message, _to_see(spec.sees)


def _to_see(sees: specs.Sees | None) -> str:
    return "give the teacher sees: …" if sees is None else "add text or a slot to sees"
