"""Loss terms and the teacher they need."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.errors import Path, shorten
from sdkit.language.rules.base import (
    Context,
    Finding,
    consultations,
    k2_terms,
    method_rule,
    of_teacher,
    run_rule,
    shape_of,
    terms,
    total_updates,
    uncallable,
)
from sdkit.language.schedules import schedules


@method_rule("a term that needs a teacher has one")
def no_teacher(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Distillation terms, log_ratio advantages, some masks and weights, and `sampled_by: teacher` all need one."""
    if spec.teacher:
        return
    hint = "add teacher: {weights: …, sees: …}"
    for path, term in of_teacher(spec):
        if isinstance(term, specs.Distillation):
            yield path, f"term {shorten(path[-1])} distils, but there is no teacher", hint
        else:
            yield (*path, "advantage"), "a log_ratio advantage asks the teacher, but there is no teacher", hint
    for path, measure in consultations(spec):
        yield path, f"this asks for the {measure}, but there is no teacher", hint
    if isinstance(spec.rollout.sampled_by, specs.TeacherSamples):
        yield ("rollout", "sampled_by"), "the teacher samples, but there is no teacher", hint


@method_rule("the teacher is used")
def unused_teacher(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A teacher that neither samples nor enters a loss term costs memory and changes nothing.  Most likely a
    term is missing.
    """
    samples = isinstance(spec.rollout.sampled_by, specs.TeacherSamples)
    consulted = any(of_teacher(spec)) or any(consultations(spec))
    if spec.teacher and not samples and not consulted:
        message = "no term distils from the teacher, and it does not sample"
        yield ("teacher",), message, "remove teacher, or add a term of kind distillation"


@method_rule("support sampled_token is used with reverse_kl only")
def sampled_token_divergence(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """For tokens drawn from the student, the surrogate's expected gradient is that of KL(student‖teacher).
    No other divergence has such a single-token estimate.
    """
    for path, term in terms(spec, specs.Distillation):
        if isinstance(term.support, specs.SampledTokenSupport) and not isinstance(term.divergence, specs.ReverseKl):
            message = f"sampled_token estimates reverse_kl, not {term.divergence.kind}"
            yield (*path, "divergence"), message, "use divergence: reverse_kl, or a top_k support"


@method_rule("remainder renormalize_teacher is used with forward_kl only")
def renormalized_teacher_divergence(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """It renormalizes the teacher but not the student.  The forward KL is then still a cross-entropy up to a
    constant; the other divergences are no longer divergences.
    """
    for path, term in terms(spec, specs.Distillation):
        support = term.support
        if isinstance(support, specs.TopKSupport) and support.remainder == "renormalize_teacher":
            if not isinstance(term.divergence, specs.ForwardKl):
                message = f"renormalize_teacher needs forward_kl, not {term.divergence.kind}"
                yield (*path, "support", "remainder"), message, "use remainder: renormalize"


@method_rule("a divergence clip applies to its divergence and support")
def clip_without_effect(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """`entry` and `log_ratio` bound the per-token entries of a KL; mixtures and user functions have none.
    With a sampled token there is only one log-ratio, so `log_ratio` applies, but `entry` does not, nor does
    `token`, which bounds a divergence at one position.
    """
    for path, term in terms(spec, specs.Distillation):
        clip, sampled = term.clip, isinstance(term.support, specs.SampledTokenSupport)
        kl = term.divergence.has_entries
        if clip.entry is not None and (not kl or sampled):
            over = "the sampled token" if sampled else term.divergence.kind
            message = f"clip.entry bounds the entries of a KL, and {over} has none"
            yield (*path, "clip", "entry"), message, "use divergence: forward_kl or reverse_kl"
        if clip.log_ratio is not None and not kl:
            message = f"clip.log_ratio bounds the log-ratios of a KL, not of {term.divergence.kind}"
            yield (*path, "clip", "log_ratio"), message, "use divergence: forward_kl or reverse_kl"
        if clip.token is not None and sampled:
            message = "clip.token bounds a divergence; the sampled token gives a gradient, no value"
            yield (*path, "clip", "token"), message, "use clip.log_ratio"


@method_rule("log_ratio bounds lie on both sides of 0")
def log_ratio_bounds(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Where student and teacher agree, the log-ratio is 0; clipping must not change that."""
    for path, term in terms(spec, specs.Distillation):
        bounds = term.clip.log_ratio
        if bounds and not bounds[0] < 0 < bounds[1]:
            message = f"log_ratio is [{bounds[0]:g}, {bounds[1]:g}], and 0 is not between them"
            yield (*path, "clip", "log_ratio"), message, "write [-5, 5], say"


@method_rule("user-defined divergence functions exist")
def divergence_file(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed.  It must define the function at its top level, and the function must
    accept the student's and the teacher's log-probabilities.
    """
    for path, term in terms(spec, specs.Distillation):
        if isinstance(term.divergence, specs.FileDivergence):
            yield from uncallable((*path, "divergence"), context, term.divergence, "student", "teacher")


@method_rule("importance ratios need untruncated sampling")
def truncated_sampling(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Log-probabilities are taken from the full softmax.  Nucleus and top-k sampling draw from a different
    distribution, so the ratio would correct by the wrong factor.
    """
    truncation = _truncation(spec, context)
    ratios = [
        name
        for _, term in terms(spec, specs.Distillation, specs.PolicyGradient)
        for name in ("old_policy", "sampler")
        if getattr(term.importance, name, None)
    ]
    if truncation and ratios:
        path, setting = truncation
        message = f"{setting}, but importance.{ratios[0]} needs samples of the whole distribution"
        yield path, message, "use top_p: 1 and top_k: 0, or drop the ratio"


@method_rule("single-token estimates use untruncated sampling", "warning")
def biased_estimate(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Estimates from the sampled token (support sampled_token, policy gradients, estimator k2) are unbiased
    only for tokens drawn from the student's full distribution.
    """
    truncation = _truncation(spec, context)
    estimates = [
        "sampled_token" for _, t in terms(spec, specs.Distillation) if t.support == specs.SampledTokenSupport()
    ]
    # With a ratio to the sampler it is an error: truncated_sampling.
    plain = [t for _, t in terms(spec, specs.PolicyGradient) if not t.importance.sampler]
    estimates += ["policy_gradient" for _ in plain]
    estimates += ["k2" for _ in k2_terms(spec)]
    if truncation and estimates:
        path, setting = truncation
        yield path, f"{setting}, so the {estimates[0]} estimate is biased", None


def _truncation(spec: specs.MethodSpec, context: Context) -> tuple[Path, str] | None:
    """The setting that truncates the sampling distribution, with its path."""
    rollout = spec.rollout
    for name, off in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(rollout, name)
        if value != off and not isinstance(rollout.sampled_by, specs.DatasetSamples):
            return ("rollout", name), context.stated(("rollout", name), value)
    return None


@method_rule("the loss uses the sampling temperature", "warning")
def temperature_mismatch(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Sampling at one temperature and comparing distributions at another is legitimate, but more often an
    oversight.
    """
    if isinstance(spec.rollout.sampled_by, specs.DatasetSamples):
        return
    sampled = spec.rollout.temperature
    for path, term in terms(spec, specs.Distillation):
        if term.temperature is not None and term.temperature != sampled:
            said = context.stated(("rollout", "temperature"), sampled, "rollout.temperature")
            yield (*path, "temperature"), f"the loss has temperature {term.temperature:g}, but {said}", None


@run_rule("a ratio to the old policy needs several updates per rollout batch", "warning")
def ratio_is_one(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """With one update per rollout batch the weights are still those that sampled it.  The ratio is always 1
    and never clipped; as a correction it also costs a forward pass.
    """
    path = ("training", "updates_per_rollout")
    if spec.training.updates_per_rollout > 1:
        return
    for term_path, term in terms(spec, specs.Distillation):
        if term.importance.old_policy:
            message = f"{context.stated(path, 1)}, so the ratio to the old policy is always 1"
            yield (*term_path, "importance", "old_policy"), message, None
    for term_path, term in terms(spec, specs.PolicyGradient):
        if term.clip:
            yield (*term_path, "clip"), f"{context.stated(path, 1)}, so the ratio is always 1 and never clipped", None


@method_rule("at most one term uses level sequence_mean")
def second_sequence_mean(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The sequence-mean ratio is one number per sequence, computed once, over the tokens of a single term."""
    levels = [
        (*path, "importance", "sampler", "level")
        for path, term in terms(spec, specs.Distillation, specs.PolicyGradient)
        if term.importance.sampler and term.importance.sampler.level == "sequence_mean"
    ]
    for path in levels[1:]:
        message = f"only one term can have level sequence_mean, and {shorten(levels[0][1])} has it"
        yield path, message, "use level: token here"


@method_rule("skip_first leaves some completion tokens")
def empty_rows(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """If every token is skipped, every row is empty and the loss is zero."""
    longest = spec.rollout.max_new_tokens
    for name, term in spec.losses.items():
        if term.mask.skip_first >= longest:
            limit = context.stated(("rollout", "max_new_tokens"), longest)
            message = f"skip_first is {term.mask.skip_first}, but {limit}: no token is left"
            yield ("losses", name, "mask", "skip_first"), message, None


@method_rule("prefix is longer than skip_first")
def prefix_before_skip(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Otherwise the two together mask out every token."""
    for name, term in spec.losses.items():
        prefix, skip = term.mask.prefix, term.mask.skip_first
        if prefix is not None and prefix <= skip:
            message = f"prefix is {prefix} and skip_first {skip}: no token is left"
            yield ("losses", name, "mask", "prefix"), message, None


@method_rule("cross-entropy trains on completions worth imitating", "warning")
def own_samples(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The expected gradient of cross-entropy on the student's own unfiltered samples is zero.  A route or a
    reward filter selects by outcome; another sampling temperature, top_p or top_k sharpens the distribution.
    """
    rollout = spec.rollout
    if spec.route or any(isinstance(filter, specs.RewardAtLeast) for filter in rollout.keep):
        return
    if isinstance(rollout.sampled_by, specs.StudentSamples):
        if rollout.temperature != 1 or _truncation(spec, context):
            return
    kinds = {type(term) for term in spec.losses.values()}
    if all("assistant" not in term.mask.roles for _, term in terms(spec, specs.CrossEntropy)):
        return
    imitates = specs.CrossEntropy in kinds and kinds <= {specs.CrossEntropy, specs.ReferenceKl}
    if imitates and rollout.sampled_by.is_on_policy:
        path = ("rollout", "sampled_by")
        message = f"{context.stated(path, rollout.sampled_by.kind)}: it trains on its own samples, unfiltered"
        yield path, message, "use sampled_by: dataset or teacher"


@run_rule("schedules end within the run", "warning")
def schedule_length(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A schedule longer than the run never reaches its end value."""
    total = total_updates(spec)
    for path, schedule in schedules(spec):
        if total and schedule.steps > total:
            yield (*path, "steps"), f"the schedule takes {schedule.steps} optimizer steps, the run {total}", None


@run_rule("a support is at most as large as the vocabulary")
def support_size(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A top-k support cannot hold more tokens than the vocabulary has."""
    if shape := shape_of(spec, context):
        yield from oversized_supports(spec, shape.vocab_size)


def oversized_supports(spec: specs.MethodSpec, vocabulary: int) -> Iterator[Finding]:
    """A finding for each top-k support that is larger than the vocabulary."""
    for path, term in terms(spec, specs.Distillation):
        if isinstance(term.support, specs.TopKSupport) and term.support.k > vocabulary:
            message = f"k is {term.support.k}, but the vocabulary has {vocabulary} tokens"
            yield (*path, "support", "k"), message, "use support: vocabulary"
