"""Token masks, token weights and routes."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import Path, did_you_mean, outside, shorten
from sdkit.language.rules.base import Context, Finding, log_ratios, method_rule, terms, uncallable
from sdkit.language.specs import FileWeight, LossSpec, MethodSpec, PerToken


@method_rule("below_floor leave_out has a floor")
def no_floor(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Without a floor, no token lies below it."""
    for path, _, part in log_ratios(spec):
        if part.below_floor == "leave_out" and part.floor is None:
            yield (*path, "below_floor"), "below_floor: leave_out needs a floor", "add floor: a number below 0"


@method_rule("weights within a group need several completions")
def lone_weight(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """In a group of one, the pass rate is 0 or 1, so every pass_rate weight is 0; and a perplexity equals its
    mean, so every perplexity weight is 1.
    """
    if spec.rollout.completions_per_prompt > 1:
        return
    for name, term in spec.losses.items():
        if term.token_weight and term.token_weight.needs_group:
            group = context.stated(("rollout", "completions_per_prompt"), 1)
            hint = "set rollout.completions_per_prompt to 2 or more"
            yield ("losses", name, "weight"), f"{group}, so every weight is {term.token_weight.value_alone}", hint


@method_rule("a joint denominator is shared by several terms", "warning")
def lone_joint(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """If only one term says joint, the joint count is that term's own count."""
    joint = [n for n, t in spec.losses.items() if t.average == PerToken(denominator="joint")]
    if len(joint) == 1:
        path = ("losses", joint[0], "average", "denominator")
        yield path, "no other term has denominator joint, so it is the term's own", None


@method_rule("a route names terms, each once")
def routed_terms(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A term on both branches would count every rollout, as an unrouted term does."""
    if spec.route is None:
        return
    seen: dict[str, Path] = {}
    for branch in ("then", "otherwise"):
        for index, name in enumerate(getattr(spec.route, branch)):
            path: Path = ("route", branch, index)
            if name not in spec.losses:
                yield path, f"term {shorten(name)} {outside(spec.losses)}", did_you_mean(name, spec.losses)
            elif name in seen:
                hint = "leave it out of the route: then it counts all rollouts"
                yield path, f"term {shorten(name)} is routed twice", hint if seen[name][1] != branch else "remove one"
            seen.setdefault(name, path)


@method_rule("a route on failed_with_context has a teacher")
def route_context(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """failed_with_context selects rollouts with a teacher prompt; without a teacher there are none."""
    if spec.route and spec.route.when == "failed_with_context" and not spec.teacher:
        yield ("route", "when"), "no rollout has a context: there is no teacher", "use when: failed, or add a teacher"


@method_rule("user-defined weight functions exist")
def weight_file(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed.  It must define the function at its top level, and the function must
    accept `counts` and every name in `given`.
    """
    for path, term in terms(spec, LossSpec):
        if isinstance(term.token_weight, FileWeight):
            given = term.token_weight.given
            yield from uncallable((*path, "weight"), context, term.token_weight, "counts", given=given)
