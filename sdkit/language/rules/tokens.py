"""Token masks, token weights and routes."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import Path, did_you_mean, outside, shorten
from sdkit.language.patterns import repeats_repeated
from sdkit.language.rules.base import Context, Finding, log_ratios, method_rule, pattern_fault, terms, uncallable
from sdkit.language.specs import CrossEntropy, FileWeight, LossSpec, MethodSpec, PerToken, Schedule


@method_rule("below_floor leave_out has a floor")
def no_floor(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Without a floor, no token lies below it."""
    for path, _, part in log_ratios(spec):
        if part.below_floor == "leave_out" and part.floor is None:
            yield (*path, "below_floor"), "below_floor: leave_out needs a floor", "add floor: a number below 0"


@method_rule("a term that counts observations is a cross entropy")
def observed_tokens(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """The student did not sample them: they have no ratio and no advantage, and no statistics that a weight or a share of
    tokens could use.
    """
    for path, term in terms(spec, LossSpec):
        if not term.mask.counts_observations:
            continue
        if not isinstance(term, CrossEntropy):
            message = f"{term.kind} needs tokens that the student sampled, and observations are not"
            yield (*path, "mask", "roles"), message, "use kind: cross_entropy, or roles: [assistant]"
            continue
        for statistic, key in term.statistics():
            model, _, quantity = statistic.partition("_")
            figure = f"the {model}'s {quantity.replace('logprobs', 'log-probability')}"
            yield (*path, *key), f"this needs {figure}, which is known of sampled tokens only", None


@method_rule("a range of turns has a turn")
def turn_range(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Otherwise the term counts no token."""
    for path, term in terms(spec, LossSpec):
        if (turns := term.mask.turns) is None or turns.last is None:
            continue
        last = max(turns.last.start, turns.last.to) if isinstance(turns.last, Schedule) else turns.last
        if last < turns.first:
            message = f"the turns end at {last:g}, before they start at {turns.first}"
            yield (*path, "mask", "turns", "to"), message, None


@method_rule("patterns of masks are valid regular expressions")
def span_pattern(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A pattern uses the syntax of Python's `re` module."""
    for path, term in terms(spec, LossSpec):
        if term.mask.spans and (fault := pattern_fault(term.mask.spans.pattern)):
            yield (*path, "mask", "spans", "pattern"), fault, None


@method_rule("patterns of masks match a text in few ways", "warning")
def slow_pattern(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A repeated part that can itself repeat, such as `(a+)*`, may try exponentially many ways to match a text that the
    student writes.  A search that takes over 5 seconds ends the run.
    """
    for path, term in terms(spec, LossSpec):
        if term.mask.spans and repeats_repeated(term.mask.spans.pattern):
            message = "a part that repeats without limit is repeated without limit: a search may take very long"
            hint = "use a possessive repeat such as `(?:a+)*+`, or a limit"
            yield (*path, "mask", "spans", "pattern"), message, hint


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
