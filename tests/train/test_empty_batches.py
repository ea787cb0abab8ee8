"""Micro-batches and steps in which a term counts no token: no failure, no NaN, and a gradient of exactly zero."""

from types import SimpleNamespace

import pytest
import torch
from attrs import evolve
from test_collate import CPU, alone, rollout, same
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
OF_TEACHER_TOP_K = TopKSupport(k=3, chosen_by="teacher", remainder="tail_bucket")


def gradient(advantage, **parts):
    return PolicyGradient(advantage=advantage, **parts)


TERMS = {
    "forward_kl": Distillation(divergence=ForwardKl(), support=VocabularySupport()),
    "jsd": Distillation(
        divergence=Jsd(),
        support=OF_TEACHER_TOP_K,
        average=PerSequence(empty_rows="count"),
        importance=ImportanceSpec(sampler=SAMPLER),
    ),
    "sampled_token": Distillation(divergence=ReverseKl(), support=SampledTokenSupport()),
    "weighted": Distillation(divergence=ForwardKl(), support=OF_TEACHER_TOP_K, weight=TeacherEntropyWeight(rate=1.0)),
    "drift": gradient(LogRatio(), weight=DriftWeight(strength=1.0)),
    "log_ratio": gradient(LogRatio()),
    "floor": gradient(LogRatio(floor=-1.0, below_floor="leave_out")),
    "centered": gradient(LogRatio(center="sequence"), ratio="sequence", importance=PolicyImportance(sampler=SAMPLER)),
    "add": gradient(AdvantageAdd(log_ratio=LogRatio(center="sequence"))),
    "scale": gradient(AdvantageScale()),
    "group_relative": gradient(GroupRelative(), ratio="sequence"),
    "k2": ReferenceKl(estimator="k2"),
    "reference": ReferenceKl(estimator="vocabulary"),
    "cross_entropy": CrossEntropy(weight=PerplexityWeight(of="student")),
}
ALL_MASKED = MaskSpec(skip_first=9)


def told(prompt=(9, 8), completion=(4, 5, 6), group=0):
    measures = ("student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy")
    made = rollout([1, 2], prompt, completion, group)
    values = {name: (-0.5,) * len(completion) for name in measures}
    return evolve(made, advantage=1.0, token_statistics=values, group_rewards=(0.0, 1.0))


BATCHES = {
    "no teacher prompt": ([told(None), told(None)], None),
    "all masked": ([told(), told()], ALL_MASKED),
    "empty completions": ([told(completion=()), told(completion=())], None),
    "no teacher prompt, all masked": ([told(None), told(None)], ALL_MASKED),
    "no teacher prompt, empty completion": ([told(None, ()), told(None)], None),
    "no rollout": ([], None),
    "one of each": ([told(), told(None), told(completion=())], None),
}


def scores(kind, count, token):
    """What a teacher of this kind says of `count` tokens."""
    draw = torch.Generator().manual_seed(5)
    whole = HiddenStateScores(
        hidden=torch.randn(count, HIDDEN, generator=draw), head=torch.randn(VOCABULARY, HIDDEN, generator=draw)
    )
    match kind:
        case "hidden":
            return whole
        case "routed":
            part = torch.zeros(count, dtype=torch.long)
            place = torch.arange(count)
            nobody = HiddenStateScores(hidden=whole.hidden[:0], head=whole.head)
            return RoutedScores(parts=(whole, nobody), part=part, place=place, vocabulary=VOCABULARY)
        case "blended":
            return BlendedScores(parts=(whole, whole), factors=(0.5, 1.5))
        case "served":
            return top_k_logprobs(whole, token, 3, 4)


def gradients(term, batch, kind, chunk=2):
    """The loss of one micro-batch, and its gradients to hidden states and head, through the student's own path."""
    draw = torch.Generator().manual_seed(3)
    count = len(batch.tokens)
    hidden = torch.randn(count, HIDDEN, generator=draw).requires_grad_()
    head = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=draw))
    weights = SimpleNamespace(
        model=None, sharding=UNSHARDED, head=head, transform=LogitTransform(), selected_states=lambda _: hidden
    )
    student = Student(weights, 1.0, chunk, VOCABULARY)
    of_teacher = scores(kind, count, batch.tokens.token) if term.needs_teacher else None
    reference = scores("hidden", count, batch.tokens.token)
    loss, stats = student(batch, of_teacher, reference, Table({"term": term}))
    loss.backward()
    return loss, stats, [hidden.grad, head.grad]


def micro_batches(rollouts, term):
    losses = Table({"term": term})
    batch = build_loss_masks(RolloutBatch(rollouts=tuple(rollouts)), losses, all_gather=alone)
    made = collate(list(batch), losses, 100, same, CPU)
    empty = empty_micro_batch(losses, teacher=term.needs_teacher, device=CPU)
    return made.counts["term"], made.micro_batches or (empty,)


def teachers_for(term):
    """The kinds of teacher that the term can ask; one stands for all where it asks none."""
    if not term.needs_teacher:
        return ["hidden"]
    needs_whole = isinstance(getattr(term, "support", None), VocabularySupport)
    return ["hidden", "routed", "blended"] + ["served"] * (not needs_whole)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, term in TERMS.items() for kind in teachers_for(term)]
)
@pytest.mark.parametrize("case", BATCHES)
def test_what_is_not_counted_gives_no_gradient_and_no_nan(case, name, kind):
    rollouts, mask = BATCHES[case]
    term = TERMS[name]
    counts, batches = micro_batches(rollouts, term if mask is None else evolve(term, mask=mask))
    for batch in batches:
        loss, stats, grads = gradients(term, batch, kind)
        values = torch.cat([loss.detach()[None], *(g.flatten() for g in grads)])
        assert values.isfinite().all()
        assert all(value.isfinite() for value in stats.values())
        assert stats["term/tokens"] == counts.tokens
        assert bool(counts.tokens) == any(bool(g.any()) for g in grads)


def test_the_cases_have_both_outcomes():
    counted = {case: micro_batches(BATCHES[case][0], TERMS["log_ratio"])[0] for case in BATCHES}
    assert counted["no teacher prompt"].tokens == counted["no rollout"].tokens == 0
    assert counted["one of each"].tokens == 3


SIBLING = UserTurn(template="{prompt}\nExample: {sibling}", slots=Table({"sibling": SuccessfulSibling()}))
NEVER = Table({"never": RegexReward(pattern="zzzzzz")})


def failing_run(folder, path, term, keep=(), updates=1):
    """Two steps without any success."""
    spec = make_spec(
        folder,
        losses=Table({"term": term}),
        teacher=teacher_of(StudentWeights(), SIBLING),
        rewards=NEVER,
        rollout=sampling(completions_per_prompt=2, keep=keep),
        training=training(steps=2, prompts_per_step=2, updates_per_rollout=updates),
        output=OutputSpec(tensorboard=False, tripwire_steps=2),
    )
    train(spec, path)
    return metrics(path), [line["wire"] for line in lines(path / "warnings.jsonl")]


@pytest.mark.parametrize(
    ("term", "updates"),
    [
        (gradient(LogRatio()), 1),
        (gradient(LogRatio(center="sequence"), ratio="sequence"), 2),
        (gradient(AdvantageAdd()), 1),
        (distil()["distil"], 1),
    ],
    ids=["log_ratio", "centered", "add", "distil"],
)
def test_a_run_without_any_success_ends(tiny_folder, tmp_path, term, updates):
    steps, warned = failing_run(tiny_folder, tmp_path / "run", term, updates=updates)
    assert len(steps) == 2
    assert set(warned) & {"nothing_counted", "no_success"}
    for step in steps:
        assert step["rollout/with_teacher"] == 0
        assert step["grad_norm"] == 0
        assert step["loss"] == 0


@pytest.mark.parametrize("keep", [RewardAtLeast(threshold=1.0), NonConstantGroup()])
def test_a_run_that_keeps_nothing_ends(tiny_folder, tmp_path, keep):
    term = gradient(AdvantageAdd())
    steps, warned = failing_run(tiny_folder, tmp_path / "run", term, keep=(keep,))
    assert "nothing_counted" in warned
    assert [step["rollout/kept"] for step in steps] == [0, 0]
    assert not any("grad_norm" in step for step in steps)
