"""The terms policy_gradient and reference_kl in an objective: against loops, and their needs and metrics."""

import math
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve
from torch.testing import assert_close

from sdkit.language.specs import (
    AdvantageAdd,
    AdvantageScale,
    ClipSpec,
    CrossEntropy,
    Distillation,
    ForwardKl,
    GroupRelative,
    LogRatio,
    PolicyGradient,
    PolicyImportance,
    ReferenceKl,
    SamplerRatio,
    Table,
    VocabularySupport,
)
from sdkit.losses.objective import Objective, sampler_ratio
from sdkit.losses.policy_terms import reward_advantages, sequence_means

TOKEN = [3, 0, 6, 2, 2]
ROW = [0, 0, 2, 2, 2]  # row 1 is empty
WEIGHTS = [0.5, 0.0, 0.25, 1.0, 2.0]
OLD = [-1.0, -2.0, -3.0, -0.5, -1.5]
SAMPLER = [-1.2, -2.5, -2.9, -0.5, -2.4]
REWARD_ADVANTAGES = [1.5, 1.5, -0.7, -0.7, -0.7]
COUNTED = [j for j, w in enumerate(WEIGHTS) if w > 0]
CLIP = ClipSpec(low=0.3, high=0.4, dual=1.5)
TOKEN_SAMPLER = PolicyImportance(sampler=SamplerRatio(cap=1.3, level="token"))


def pull(advantage=None, **settings):
    return PolicyGradient(advantage=advantage or GroupRelative(), **settings)


@pytest.fixture
def tokens(tokens_of):
    return tokens_of(
        TOKEN,
        row=torch.tensor(ROW),
        weights={"pull": torch.tensor(WEIGHTS)},
        old_logprobs=torch.tensor(OLD, dtype=torch.float64),
        sampler_logprobs=torch.tensor(SAMPLER, dtype=torch.float64),
        advantages=torch.tensor(REWARD_ADVANTAGES, dtype=torch.float64),
    )


def sampled_logprobs(logits, token=TOKEN, temperature=1.0):
    return (logits / temperature).log_softmax(-1)[range(len(token)), token]


def with_first_pass(losses, logits, tokens, temperature=1.0):
    """Adds the statistics of full sequences that the objective needs."""
    objective = Objective(losses, temperature)
    now = sampled_logprobs(logits.student.detach(), tokens.token, temperature)
    if objective.needs_sequence_means:
        theirs = sampled_logprobs(logits.teacher, tokens.token, temperature)
        tokens = evolve(tokens, sequence_means=sequence_means(losses, now, theirs, tokens, 3))
    if objective.needs_sequence_ratio:
        tokens = evolve(tokens, ratio=sampler_ratio(losses, now, tokens, 3))
    return tokens


def loss_gradient_stats(term, logits, tokens, temperature=1.0):
    """Loss, gradient and metric sums, after the first pass that the term needs."""
    losses = Table({"pull": term})
    objective = Objective(losses, temperature)
    tokens = with_first_pass(losses, logits, tokens, temperature)
    teacher = logits.teacher if objective.needs_teacher else None
    reference = logits.teacher if objective.needs_reference else None
    loss, stats = objective(logits.student, teacher, tokens, reference)
    (grad,) = torch.autograd.grad(loss, logits.student, retain_graph=True)
    return loss.detach(), grad, stats


def logprobs(naive, rows, temperature):
    return [math.log(naive.softmax(z, temperature)[y]) for z, y in zip(rows, TOKEN, strict=True)]


def sequence(values, j):
    """Mean over the counted tokens of token j's row."""
    own = [values[i] for i in COUNTED if ROW[i] == ROW[j]]
    return sum(own) / len(own)


def advantages_of(advantage, deltas, has_teacher):
    """The advantage of every token; deltas: log teacher − log student."""
    match advantage:
        case GroupRelative():
            return REWARD_ADVANTAGES
        case LogRatio(center=center, floor=floor):
            raw = deltas if floor is None else [max(x, floor) for x in deltas]
            raw = [x if t else 0.0 for x, t in zip(raw, has_teacher, strict=True)]
            return [
                x - (sequence(raw, j) if center == "sequence" else 0) if j in COUNTED else math.nan
                for j, x in enumerate(raw)
            ]
        case AdvantageAdd(log_ratio=spec, group_weight=reward_factor, log_ratio_weight=teacher_factor):
            teachers = advantages_of(spec, deltas, has_teacher)
            return [reward_factor * a + teacher_factor * b for a, b in zip(REWARD_ADVANTAGES, teachers, strict=True)]
        case AdvantageScale(log_ratio=spec, share=share, low=low, high=high):
            factors = [
                min(max(math.exp(math.copysign(1, a) * d), 1 - low), 1 + high)
                for a, d in zip(REWARD_ADVANTAGES, advantages_of(spec, deltas, has_teacher), strict=True)
            ]
            return [a * (1 - share + share * f) for a, f in zip(REWARD_ADVANTAGES, factors, strict=True)]


def policy_loss(naive, term, logits, temperature, old, weights=WEIGHTS, has_teacher=(True,) * 5):
    """Σ_j w_j c_j L(ρ_j, A_j) as a function of the student's logits; `old`: OLD, or the current logprobs."""
    teacher = logprobs(naive, logits.teacher.tolist(), temperature)
    deltas = [t - o for t, o in zip(teacher, old, strict=True)]
    advantages = advantages_of(term.advantage, deltas, has_teacher)
    sampler = [math.exp(o - s) for o, s in zip(old, SAMPLER, strict=True)]

    def loss(rows):
        now = logprobs(naive, rows, temperature)
        total = 0.0
        for j in COUNTED:
            log_ratios = [n - o for n, o in zip(now, old, strict=True)]
            ratio = math.exp(sequence(log_ratios, j) if term.ratio == "sequence" else log_ratios[j])
            clipped = min(max(ratio, 1 - term.clip.low), 1 + term.clip.high) if term.clip else ratio
            token_loss = max(-ratio * advantages[j], -clipped * advantages[j])
            if term.clip and term.clip.dual and advantages[j] < 0:
                token_loss = min(token_loss, -term.clip.dual * advantages[j])
            correction = term.importance.sampler
            factor = min(sampler[j], correction.cap) if correction else 1.0
            total += weights[j] * factor * token_loss
        return total

    return loss


def assert_matches_loops(naive, logits, actual, loss):
    rows = logits.student.tolist()

    def flat(z):
        return loss([z[7 * j : 7 * j + 7] for j in range(5)])

    slopes = naive.slope(flat, [x for row in rows for x in row])
    assert actual[0].item() == pytest.approx(loss(rows), abs=1e-12)
    assert_close(actual[1].flatten(), torch.tensor(slopes, dtype=torch.float64), atol=1e-8, rtol=0)


ADVANTAGES = [
    GroupRelative(),
    LogRatio(),
    LogRatio(center="sequence"),
    LogRatio(floor=-0.5),
    LogRatio(center="sequence", floor=-0.5),
    AdvantageAdd(group_weight=0.9, log_ratio_weight=0.1, log_ratio=LogRatio(floor=-0.5)),
    AdvantageAdd(log_ratio_weight=2.0, log_ratio=LogRatio(center="sequence")),
    AdvantageScale(),
    AdvantageScale(share=0.9, low=0.7, high=1.5, log_ratio=LogRatio(center="sequence")),
]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("importance", [PolicyImportance(), TOKEN_SAMPLER])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=str)
def test_token_ratio_matches_loops(naive, logits, tokens, advantage, clip, importance, temperature):
    term = pull(advantage, clip=clip, importance=importance)
    loss = policy_loss(naive, term, logits, temperature, OLD)
    assert_matches_loops(naive, logits, loss_gradient_stats(term, logits, tokens, temperature), loss)


@pytest.mark.parametrize("advantage", ADVANTAGES[5:], ids=str)
def test_rollout_without_teacher_prompt_uses_only_the_reward(naive, logits, tokens, advantage):
    """Row 0 has one, row 2 has none, so the teacher's scores there do not matter."""
    has_teacher = [True, True, False, False, False]
    tokens = evolve(tokens, has_teacher=torch.tensor(has_teacher))
    other = SimpleNamespace(student=logits.student, teacher=logits.teacher.clone())
    other.teacher[2:] = torch.linspace(-3, 3, 7)
    term = pull(advantage, clip=CLIP)
    loss = policy_loss(naive, term, logits, 1.0, OLD, has_teacher=has_teacher)
    assert_matches_loops(naive, logits, loss_gradient_stats(term, logits, tokens), loss)
    assert_close(loss_gradient_stats(term, other, tokens)[:2], loss_gradient_stats(term, logits, tokens)[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_sequence_ratio_matches_loops(naive, logits, tokens, clip, temperature):
    """The exact gradient of the sequence ratio; all tokens of a row have the same weight, as in collate."""
    even = [0.5, 0.0, 2.0, 2.0, 2.0]
    tokens = evolve(tokens, weights={"pull": torch.tensor(even)})
    term = pull(ratio="sequence", clip=clip)
    loss = policy_loss(naive, term, logits, temperature, OLD, even)
    assert_matches_loops(naive, logits, loss_gradient_stats(term, logits, tokens, temperature), loss)


def test_sequence_ratio_multiplies_each_tokens_own_advantage(logits, tokens):
    """If advantages differ within a sequence, each token keeps its own: the gradient of s_i sg(A_t) log S_t."""
    term = pull(LogRatio(), ratio="sequence")
    _, grad, stats = loss_gradient_stats(term, logits, tokens)
    now, theirs = sampled_logprobs(logits.student), sampled_logprobs(logits.teacher)
    log_ratio = (now - tokens.old_logprobs).detach()
    means = torch.stack([log_ratio[0], log_ratio[0], *[log_ratio[2:].mean()] * 3])
    advantage = theirs - tokens.old_logprobs
    loss = (-torch.tensor(WEIGHTS) * means.exp() * advantage * now).sum()
    assert_close(grad, *torch.autograd.grad(loss, logits.student))
    assert_close(stats["pull/ratio"], means.exp()[COUNTED].sum())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=str)
def test_without_old_logprobs_the_ratio_is_one_with_a_gradient(naive, logits, tokens, advantage, ratio):
    tokens = evolve(tokens, old_logprobs=None)
    actual = loss_gradient_stats(pull(advantage, ratio=ratio, clip=CLIP), logits, tokens)
    current_logprobs = logprobs(naive, logits.student.tolist(), 1.0)
    loss = policy_loss(naive, pull(advantage, clip=CLIP), logits, 1.0, current_logprobs)
    assert_matches_loops(naive, logits, actual, loss)
    assert actual[2]["pull/ratio"] == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["k2", "vocabulary"])
def test_reference_kl_matches_loops(naive, logits, tokens, estimator, temperature):
    def loss(rows):
        total = 0.0
        for j in COUNTED:
            s = naive.softmax(rows[j], temperature)
            r = naive.softmax(logits.teacher[j].tolist(), temperature)
            y = TOKEN[j]
            one = 0.5 * (math.log(s[y]) - math.log(r[y])) ** 2
            total += WEIGHTS[j] * (one if estimator == "k2" else naive.kl(s, r))
        return total

    assert_matches_loops(
        naive, logits, loss_gradient_stats(ReferenceKl(estimator=estimator), logits, tokens, temperature), loss
    )


def test_sampler_ratio_can_be_a_sequence_mean(logits, tokens):
    sampler = SamplerRatio(cap=1.3, level="sequence_mean")
    actual = loss_gradient_stats(pull(importance=PolicyImportance(sampler=sampler)), logits, tokens)
    ratios = (torch.tensor(OLD) - torch.tensor(SAMPLER)).exp().clamp(max=1.3)
    mean = torch.stack([ratios[0], ratios[0], *[ratios[2:].mean()] * 3])
    by_hand = evolve(tokens, weights={"pull": torch.tensor(WEIGHTS) * mean})
    expected = loss_gradient_stats(pull(), logits, by_hand)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("term", [pull(LogRatio(), clip=ClipSpec(low=0.2, high=0.2)), ReferenceKl(estimator="k2")])
def test_expected_gradient_is_that_of_the_reverse_kl(logits, tokens_of, term):
    """Enumerates the vocabulary: weight S_y for every y of one position."""
    student, other = logits.student[:1], logits.teacher[:1]
    every = tokens_of(range(7), weights={"pull": student.softmax(-1).detach()[0]})
    objective = Objective(Table({"pull": term}), 1.0)
    others = other.expand(7, 7)
    loss, _ = objective(student.expand(7, 7), others, every, others)
    (grad,) = torch.autograd.grad(loss, logits.student, retain_graph=True)
    near = Objective(Table({"pull": ReferenceKl(estimator="vocabulary")}), 1.0)
    one = tokens_of([0], weights={"pull": torch.ones(1)})
    exact, _ = near(student, None, one, other)
    assert_close(grad, *torch.autograd.grad(exact, logits.student))


TERMS = [
    pull(clip=CLIP, importance=TOKEN_SAMPLER),
    pull(ratio="sequence"),
    pull(LogRatio()),
    pull(LogRatio(center="sequence", floor=-0.5)),
    ReferenceKl(estimator="k2"),
    ReferenceKl(estimator="vocabulary"),
]


def name_of(term):
    return f"{term.kind}-{getattr(term, 'estimator', getattr(term, 'ratio', ''))}"


@pytest.mark.parametrize("term", TERMS, ids=name_of)
def test_uncounted_tokens_and_row_order_change_nothing(logits, tokens, term):
    """One uncounted token is impossible for the student, another for both sides."""
    loss, grad, stats = loss_gradient_stats(term, logits, tokens)
    student, other = logits.student.detach().clone(), logits.teacher.clone()
    student[1, TOKEN[1]] = -torch.inf
    forbidden = torch.zeros(1, 7, dtype=torch.float64)
    forbidden[0, 4] = -torch.inf
    student = torch.cat([student, forbidden]).requires_grad_()
    order = torch.tensor([2, 3, 4, 0, 1, 5])

    def reorder(x, value):
        return torch.cat([x, torch.full((1,), value, dtype=x.dtype)])[order]

    floats = ("old_logprobs", "sampler_logprobs", "advantages")
    other_order = evolve(
        tokens,
        token=reorder(tokens.token, 4),
        row=torch.tensor([0, 0, 0, 1, 1, 2]),
        weights={"pull": reorder(tokens.weights["pull"], 0)},
        **{name: reorder(getattr(tokens, name), -0.5) for name in floats},
    )
    other_logits = SimpleNamespace(
        student=student[order].detach().requires_grad_(), teacher=torch.cat([other, forbidden])[order]
    )
    actual = loss_gradient_stats(term, other_logits, other_order)
    back = actual[1][order.argsort()]
    assert_close(actual[0], loss)
    assert_close(back[COUNTED], grad[COUNTED])
    assert not back[[1, 5]].any()
    assert_close(actual[2], stats)


@pytest.mark.parametrize("term", TERMS, ids=name_of)
def test_token_forbidden_on_every_side_changes_nothing(logits, tokens, term):
    plain, grad, _ = loss_gradient_stats(term, logits, tokens)
    never = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    wider = SimpleNamespace(
        student=torch.cat([logits.student.detach(), never], -1).requires_grad_(),
        teacher=torch.cat([logits.teacher, never], -1),
    )
    loss, wide, stats = loss_gradient_stats(term, wider, tokens)
    assert_close(loss, plain)
    assert_close(wide[:, :7], grad)
    assert not wide[:, 7].any()
    assert all(torch.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("term", [*TERMS[2:], pull(AdvantageAdd())], ids=name_of)
def test_uncounted_token_may_be_impossible_for_the_other_side(logits, tokens, term):
    loss, grad, stats = loss_gradient_stats(term, logits, tokens)
    other = SimpleNamespace(student=logits.student, teacher=logits.teacher.clone())
    other.teacher[1, TOKEN[1]] = -torch.inf
    actual = loss_gradient_stats(term, other, tokens)
    assert_close(actual[0], loss)
    assert_close(actual[1], grad)
    assert_close(actual[2], stats)


def test_zero_advantages_have_no_gradient(logits, tokens):
    tokens = evolve(tokens, advantages=torch.zeros(5))
    for ratio in ("token", "sequence"):
        loss, grad, _ = loss_gradient_stats(pull(ratio=ratio, clip=CLIP), logits, tokens)
        assert loss == 0
        assert not grad.any()


def test_reference_kl_of_equal_sides_is_zero(logits, tokens):
    equal_sides = SimpleNamespace(student=logits.student, teacher=logits.student.detach())
    for estimator in ("k2", "vocabulary"):
        loss, grad, _ = loss_gradient_stats(ReferenceKl(estimator=estimator), equal_sides, tokens)
        assert abs(loss.item()) < 1e-12
        assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("term", TERMS, ids=name_of)
def test_chunk_without_tokens_has_a_graph_and_every_metric(logits, tokens, term):
    full = loss_gradient_stats(term, logits, tokens)[2]
    losses = Table({"pull": term})
    none = with_first_pass(losses, logits, tokens).slice(0, 0)
    empty = SimpleNamespace(student=logits.student[:0], teacher=logits.teacher[:0])
    loss, stats = Objective(losses, 1.0)(empty.student, empty.teacher, none, empty.teacher)
    (grad,) = torch.autograd.grad(loss, logits.student)
    assert loss == 0
    assert not grad.any()
    assert stats.keys() == full.keys()
    assert all(x == 0 for x in stats.values())


def test_metrics_of_a_policy_gradient(logits, tokens):
    clip = ClipSpec(low=0.3, high=0.4, dual=1.2)
    _, _, stats = loss_gradient_stats(pull(clip=clip, coefficient=2.0), logits, tokens)
    now = sampled_logprobs(logits.student.detach())
    ratio, advantages = (now - tokens.old_logprobs).exp()[COUNTED], tokens.advantages[COUNTED]
    low, high = (advantages < 0) & (ratio < 0.7), (advantages > 0) & (ratio > 1.4)
    dual = (advantages < 0) & (ratio > 1.2)
    assert {k: v.item() for k, v in stats.items() if k != "pull/student_entropy"} == pytest.approx(
        {
            "loss/pull": loss_gradient_stats(pull(clip=clip), logits, tokens)[0].item() * 2,
            "pull/tokens": 4,
            "pull/token_loss": stats["pull/token_loss"].item(),
            "pull/ratio": ratio.sum().item(),
            "pull/advantage": advantages.sum().item(),
            "pull/clip_low": low.sum().item(),
            "pull/clip_high": high.sum().item(),
            "pull/clip_dual": dual.sum().item(),
            "pull/old_kl": (ratio - 1 - ratio.log()).sum().item(),
        }
    )
    assert 0 < low.sum() + high.sum() < 4
    assert 0 < dual.sum() < 4


def test_metrics_of_a_reference_kl(naive, logits, tokens):
    for estimator in ("k2", "vocabulary"):
        stats = loss_gradient_stats(ReferenceKl(estimator=estimator), logits, tokens)[2]
        sides = [
            (naive.softmax(logits.student[j].tolist()), naive.softmax(logits.teacher[j].tolist())) for j in COUNTED
        ]
        sampled = [TOKEN[j] for j in COUNTED]
        k1 = sum(math.log(s[y] / r[y]) for (s, r), y in zip(sides, sampled, strict=True))
        assert stats["pull/k1"].item() == pytest.approx(k1)
        assert stats["pull/reference_kl"].item() == pytest.approx(sum(naive.kl(*x) for x in sides))


def test_metric_names_of_each_term(logits, tokens):
    def keys(term):
        stats = loss_gradient_stats(term, logits, tokens)[2]
        return {key.removeprefix("pull/") for key in stats} - {"loss/pull"}

    common = {"tokens", "token_loss", "student_entropy"}
    plain = common | {"ratio", "advantage", "old_kl"}
    assert keys(pull()) == keys(pull(LogRatio())) == plain
    two_sided = plain | {"clip_low", "clip_high"}
    assert keys(pull(clip=ClipSpec(low=0.2, high=0.2))) == two_sided
    assert keys(pull(clip=CLIP)) == two_sided | {"clip_dual"}
    assert keys(pull(importance=TOKEN_SAMPLER)) == plain | {"sampler_ratio", "ratio_capped"}
    assert keys(ReferenceKl(estimator="k2")) == common | {"k1", "reference_kl"}


@pytest.mark.parametrize(
    ("term", "needs"),
    [
        (CrossEntropy(), set()),
        (Distillation(divergence=ForwardKl(), support=VocabularySupport()), {"teacher"}),
        (pull(), set()),
        (pull(ratio="sequence"), {"sequence_means"}),
        (pull(LogRatio()), {"teacher"}),
        (pull(AdvantageAdd()), {"teacher"}),
        (pull(AdvantageScale(log_ratio=LogRatio(center="sequence"))), {"teacher", "sequence_means"}),
        (pull(LogRatio(center="sequence")), {"teacher", "sequence_means"}),
        (ReferenceKl(estimator="k2"), {"reference"}),
        (pull(importance=PolicyImportance(sampler=SamplerRatio(cap=2.0, level="sequence_mean"))), {"sequence_ratio"}),
    ],
)
def test_objective_states_its_needs(term, needs):
    objective = Objective(Table({"pull": term}), 1.0)
    kinds = ("teacher", "reference", "sequence_means", "sequence_ratio")
    assert {kind for kind in kinds if getattr(objective, f"needs_{kind}")} == needs


@pytest.mark.parametrize(
    ("term", "missing", "message"),
    [
        (pull(), {"advantages": None}, r"needs Tokens\.advantages"),
        (pull(ratio="sequence"), {}, r"pull/log_ratio needs Tokens\.sequence_means"),
        (pull(LogRatio()), {}, "needs the teacher's logits"),
        (ReferenceKl(estimator="k2"), {}, "needs the reference's logits"),
    ],
)
def test_missing_input_is_named(logits, tokens, term, missing, message):
    with pytest.raises(ValueError, match=message):
        Objective(Table({"pull": term}), 1.0)(logits.student, None, evolve(tokens, **missing))


def test_centering_without_a_teacher_is_an_error(tokens):
    losses = Table({"pull": pull(LogRatio(center="sequence"))})
    with pytest.raises(ValueError, match="needs the teacher's log-probabilities"):
        sequence_means(losses, torch.zeros(5), None, tokens, 3)


def test_misshapen_reference_is_an_error(logits, tokens):
    with pytest.raises(ValueError, match=r"student and reference differ in shape: \(5, 7\) and"):
        Objective(Table({"pull": ReferenceKl(estimator="k2")}), 1.0)(
            logits.student, None, tokens, logits.teacher[:, :6]
        )


def test_rewards_become_advantages_only_for_terms_that_use_them():
    rewards, group = torch.tensor([1.0, 0, 3, 3]), torch.tensor([0, 0, 1, 1])
    assert reward_advantages(Table({"imitate": CrossEntropy()}), rewards, group) is None
    assert reward_advantages(Table({"pull": pull(LogRatio())}), rewards, group) is None
    advantages = reward_advantages(Table({"pull": pull(), "again": pull(clip=CLIP)}), rewards, group)
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_terms_share_one_advantage_of_the_reward():
    two = Table({"pull": pull(), "again": pull(GroupRelative(scale="group_std"))})
    with pytest.raises(ValueError, match="same group_relative advantage"):
        Objective(two, 1.0)


def test_sequence_means_cover_the_terms_counted_tokens(tokens):
    losses = Table({"pull": pull(ratio="sequence"), "again": pull(ratio="sequence")})
    tokens = evolve(tokens, weights={"pull": torch.tensor(WEIGHTS), "again": torch.tensor([0.0, 1, 1, 0, 0])})
    now = torch.tensor([-1.0, -1.5, -2.0, -1.0, -1.0], dtype=torch.float64)  # 0, ½, 1, −½, ½ up
    means = sequence_means(losses, now, None, tokens, 3)
    third = 1 / 3
    assert_close(means["pull/log_ratio"], torch.tensor([0, 0, third, third, third]).double())
    assert_close(means["again/log_ratio"], torch.tensor([0, 0.5, 1, 0, 0]).double())
    assert sequence_means(losses, now, None, evolve(tokens, old_logprobs=None), 3) == {}


def test_slices_and_moves_keep_every_field(tokens):
    complete = evolve(tokens, sequence_means={"pull/log_ratio": torch.arange(5.0)})
    part = complete.slice(2, 4).to(torch.device("cpu"))
    assert part.advantages.tolist() == REWARD_ADVANTAGES[2:4]
    assert part.sequence_means["pull/log_ratio"].tolist() == [2.0, 3.0]
