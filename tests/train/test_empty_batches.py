"""Micro-batches and steps in which a term counts no token: no failure, no NaN, and a gradient of exactly zero."""

from types import SimpleNamespace

import pytest
import torch
from attrs import evolve
from one_rank import all_gather
from test_collate import CPU, clone, rollout
from tinyruns import distil, lines, make_spec, metrics, train, training
from tinyruns import rollout as sampling
from tinyruns import teacher as teacher_of

from sdkit.batches import BlendedScores, HiddenStateScores, LogitTransform, RolloutBatch, RoutedScores
from sdkit.language.specs import (
    AdvantageAdd,
    AdvantageScale,
    CrossEntropy,
    Distillation,
    DriftWeight,
    ForwardKl,
    GroupRelative,
    ImportanceSpec,
    Jsd,
    LogRatio,
    MaskSpec,
    NonConstantGroup,
    OutputSpec,
    PerplexityWeight,
    PerSequence,
    PolicyGradient,
    PolicyImportance,
    ReferenceKl,
    RegexReward,
    ReverseKl,
    RewardAtLeast,
    SampledTokenSupport,
    SamplerRatio,
    StudentWeights,
    SuccessfulSibling,
    Table,
    TeacherEntropyWeight,
    TopKSupport,
    UserTurn,
    VocabularySupport,
)
from sdkit.losses.chunks import top_k_logprobs
from sdkit.models.weights import UNSHARDED
from sdkit.train.collate import collate, empty_micro_batch
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.student import Student

HIDDEN, VOCABULARY = 6, 16
SAMPLER = SamplerRatio(cap=2.0, level="sequence_mean")
TEACHER_TOP_K = TopKSupport(k=3, chosen_by="teacher", remainder="tail_bucket")


def policy_gradient(advantage, **parts):
    return PolicyGradient(advantage=advantage, **parts)


TERMS = {
    "forward_kl": Distillation(divergence=ForwardKl(), support=VocabularySupport()),
    "jsd": Distillation(
        divergence=Jsd(),
        support=TEACHER_TOP_K,
        average=PerSequence(empty_rows="count"),
        importance=ImportanceSpec(sampler=SAMPLER),
    ),
    "sampled_token": Distillation(divergence=ReverseKl(), support=SampledTokenSupport()),
    "weighted": Distillation(divergence=ForwardKl(), support=TEACHER_TOP_K, weight=TeacherEntropyWeight(rate=1.0)),
    "drift": policy_gradient(LogRatio(), weight=DriftWeight(strength=1.0)),
    "log_ratio": policy_gradient(LogRatio()),
    "floor": policy_gradient(LogRatio(floor=-1.0, below_floor="leave_out")),
    "centered": policy_gradient(
        LogRatio(center="sequence"), ratio="sequence", importance=PolicyImportance(sampler=SAMPLER)
    ),
    "add": policy_gradient(AdvantageAdd(log_ratio=LogRatio(center="sequence"))),
    "scale": policy_gradient(AdvantageScale()),
    "group_relative": policy_gradient(GroupRelative(), ratio="sequence"),
    "k2": ReferenceKl(estimator="k2"),
    "reference": ReferenceKl(estimator="vocabulary"),
    "cross_entropy": CrossEntropy(weight=PerplexityWeight(of="student")),
}
ALL_MASKED = MaskSpec(skip_first=9)


def scored_rollout(prompt=(9, 8), completion=(4, 5, 6), group=0):
    statistics = ("student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy")
    scored = rollout([1, 2], prompt, completion, group)
    values = {name: (-0.5,) * len(completion) for name in statistics}
    return evolve(scored, advantage=1.0, token_statistics=values, group_rewards=(0.0, 1.0))


BATCHES = {
    "no teacher prompt": ([scored_rollout(None), scored_rollout(None)], None),
    "all masked": ([scored_rollout(), scored_rollout()], ALL_MASKED),
    "empty completions": ([scored_rollout(completion=()), scored_rollout(completion=())], None),
    "no teacher prompt, all masked": ([scored_rollout(None), scored_rollout(None)], ALL_MASKED),
    "no teacher prompt, empty completion": ([scored_rollout(None, ()), scored_rollout(None)], None),
    "no rollout": ([], None),
    "one of each": ([scored_rollout(), scored_rollout(None), scored_rollout(completion=())], None),
}


def scores(kind, count, token):
    """Teacher scores of this kind for `count` tokens."""
    draw = torch.Generator().manual_seed(5)
    full = HiddenStateScores(
        hidden=torch.randn(count, HIDDEN, generator=draw), head=torch.randn(VOCABULARY, HIDDEN, generator=draw)
    )
    match kind:
        case "hidden":
            return full
        case "routed":
            part = torch.zeros(count, dtype=torch.long)
            place = torch.arange(count)
            empty_part = HiddenStateScores(hidden=full.hidden[:0], head=full.head)
            return RoutedScores(parts=(full, empty_part), part=part, place=place, vocabulary=VOCABULARY)
        case "blended":
            return BlendedScores(parts=(full, full), factors=(0.5, 1.5))
        case "served":
            return top_k_logprobs(full, token, 3, 4)


def gradients(term, batch, kind, chunk=2):
    """Loss and metrics of one micro-batch, and the gradients of hidden states and head, computed by `Student`."""
    draw = torch.Generator().manual_seed(3)
    count = len(batch.tokens)
    hidden = torch.randn(count, HIDDEN, generator=draw).requires_grad_()
    head = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=draw))
    weights = SimpleNamespace(
        model=None, sharding=UNSHARDED, head=head, transform=LogitTransform(), selected_states=lambda _: hidden
    )
    student = Student(weights, 1.0, chunk, VOCABULARY)
    teacher_scores = scores(kind, count, batch.tokens.token) if term.needs_teacher else None
    reference = scores("hidden", count, batch.tokens.token)
    loss, stats = student(batch, teacher_scores, reference, Table({"term": term}))
    loss.backward()
    return loss, stats, [hidden.grad, head.grad]


def micro_batches(rollouts, term):
    losses = Table({"term": term})
    batch = build_loss_masks(RolloutBatch(rollouts=tuple(rollouts)), losses, all_gather=all_gather)
    collated = collate(list(batch), losses, 100, clone, CPU)
    empty = empty_micro_batch(losses, teacher=term.needs_teacher, device=CPU)
    return collated.counts["term"], collated.micro_batches or (empty,)


def teachers_for(term):
    """The kinds of teacher that the term can use; just one if it uses none."""
    if not term.needs_teacher:
        return ["hidden"]
    needs_vocabulary = isinstance(getattr(term, "support", None), VocabularySupport)
    return ["hidden", "routed", "blended"] + ["served"] * (not needs_vocabulary)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, term in TERMS.items() for kind in teachers_for(term)]
)
@pytest.mark.parametrize("case", BATCHES)
def test_uncounted_tokens_give_no_gradient_and_no_nan(case, name, kind):
    rollouts, mask = BATCHES[case]
    term = TERMS[name]
    counts, batches = micro_batches(rollouts, term if mask is None else evolve(term, mask=mask))
    for batch in batches:
        loss, stats, grads = gradients(term, batch, kind)
        values = torch.cat([loss.detach()[None], *(g.flatten() for g in grads)])
        assert values.isfinite().all()
        assert all(bool(value.isfinite().all()) for value in stats.values())
        assert stats["term/tokens"] == counts.tokens
        assert bool(counts.tokens) == any(bool(g.any()) for g in grads)


def test_cases_include_empty_and_nonempty_batches():
    counts = {case: micro_batches(BATCHES[case][0], TERMS["log_ratio"])[0] for case in BATCHES}
    assert counts["no teacher prompt"].tokens == counts["no rollout"].tokens == 0
    assert counts["one of each"].tokens == 3


SIBLING = UserTurn(template="{prompt}\nExample: {sibling}", slots=Table({"sibling": SuccessfulSibling()}))
NEVER = Table({"never": RegexReward(pattern="zzzzzz")})


def failing_run(folder, path, term, keep=(), updates=1):
    """Metrics and warnings of two steps in which no rollout succeeds."""
    spec = make_spec(
        folder,
        losses=Table({"term": term}),
        teacher=teacher_of(StudentWeights(), SIBLING),
        rewards=NEVER,
        rollout=sampling(completions_per_prompt=2, keep=keep),
        training=training(steps=2, prompts_per_step=2, updates_per_rollout=updates),
        output=OutputSpec(trackers=(), tripwire_steps=2),
    )
    train(spec, path)
    return metrics(path), [line["wire"] for line in lines(path / "warnings.jsonl")]


@pytest.mark.parametrize(
    ("term", "updates"),
    [
        (policy_gradient(LogRatio()), 1),
        (policy_gradient(LogRatio(center="sequence"), ratio="sequence"), 2),
        (policy_gradient(AdvantageAdd()), 1),
        (distil()["distil"], 1),
    ],
    ids=["log_ratio", "centered", "add", "distil"],
)
def test_run_without_success_completes(tiny_folder, tmp_path, term, updates):
    steps, warnings = failing_run(tiny_folder, tmp_path / "run", term, updates=updates)
    assert len(steps) == 2
    assert set(warnings) & {"nothing_counted", "no_success"}
    for step in steps:
        assert step["rollout/with_teacher"] == 0
        assert step["grad_norm"] == 0
        assert step["loss"] == 0


@pytest.mark.parametrize("keep", [RewardAtLeast(threshold=1.0), NonConstantGroup()])
def test_run_whose_filters_drop_everything_completes(tiny_folder, tmp_path, keep):
    term = policy_gradient(AdvantageAdd())
    steps, warnings = failing_run(tiny_folder, tmp_path / "run", term, keep=(keep,))
    assert "nothing_counted" in warnings
    assert [step["rollout/kept"] for step in steps] == [0, 0]
    assert not any("grad_norm" in step for step in steps)
