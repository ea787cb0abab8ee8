"""The terms policy_gradient and reference_kl inside an objective: against loops, and what they need and measure."""

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
WORTH = [1.5, 1.5, -0.7, -0.7, -0.7]
COUNTED = [j for j, w in enumerate(WEIGHTS) if w > 0]
CLIP = ClipSpec(low=0.3, high=0.4, dual=1.5)
TOKEN_SAMPLER = PolicyImportance(sampler=SamplerRatio(cap=1.3, level="token"))


def pull(advantage=None, **given):
    return PolicyGradient(advantage=advantage or GroupRelative(), **given)


@pytest.fixture
def tokens(tokens_of):
    return tokens_of(
        TOKEN,
        row=torch.tensor(ROW),
        weights={"pull": torch.tensor(WEIGHTS)},
        old_logprobs=torch.tensor(OLD, dtype=torch.float64),
        sampler_logprobs=torch.tensor(SAMPLER, dtype=torch.float64),
        advantages=torch.tensor(WORTH, dtype=torch.float64),
    )


def picked(logits, token=TOKEN, temperature=1.0):
    return (logits / temperature).log_softmax(-1)[range(len(token)), token]


def with_first_pass(losses, logits, tokens, temperature=1.0):
    """The tokens with what the objective asks of a first pass over whole sequences."""
    objective = Objective(losses, temperature)
    now = picked(logits.student.detach(), tokens.token, temperature)
    if objective.needs_sequence_means:
        theirs = picked(logits.teacher, tokens.token, temperature)
        tokens = evolve(tokens, sequence_means=sequence_means(losses, now, theirs, tokens, 3))
    if objective.needs_sequence_ratio:
        tokens = evolve(tokens, ratio=sampler_ratio(losses, now, tokens, 3))
    return tokens


def figures(term, logits, tokens, temperature=1.0):
    """Loss, gradient and sums, after the first pass that the term asks for."""
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


def worth_of(advantage, deltas, taught):
    """The advantage of every token; deltas: log teacher − log student."""
    match advantage:
        case GroupRelative():
            return WORTH
        case LogRatio(center=center, floor=floor):
            raw = deltas if floor is None else [max(x, floor) for x in deltas]
            raw = [x if t else 0.0 for x, t in zip(raw, taught, strict=True)]
            return [
                x - (sequence(raw, j) if center == "sequence" else 0) if j in COUNTED else math.nan
                for j, x in enumerate(raw)
            ]
        case AdvantageAdd(log_ratio=spec, group_weight=first, log_ratio_weight=second):
            teachers = worth_of(spec, deltas, taught)
            return [first * a + second * b for a, b in zip(WORTH, teachers, strict=True)]
        case AdvantageScale(log_ratio=spec, share=share, low=low, high=high):
            factors = [
                min(max(math.exp(math.copysign(1, a) * d), 1 - low), 1 + high)
                for a, d in zip(WORTH, worth_of(spec, deltas, taught), strict=True)
            ]
            return [a * (1 - share + share * f) for a, f in zip(WORTH, factors, strict=True)]


def policy_loss(naive, term, logits, temperature, old, weights=WEIGHTS, taught=(True,) * 5):
    """Σ_j w_j c_j L(ρ_j, A_j) as a function of the students' logits; `old`: OLD, or the student as it stands."""
    teacher = logprobs(naive, logits.teacher.tolist(), temperature)
    deltas = [t - o for t, o in zip(teacher, old, strict=True)]
    worth = worth_of(term.advantage, deltas, taught)
    sampler = [math.exp(o - s) for o, s in zip(old, SAMPLER, strict=True)]

    def loss(rows):
        now = logprobs(naive, rows, temperature)
        total = 0.0
        for j in COUNTED:
            moved = [n - o for n, o in zip(now, old, strict=True)]
            ratio = math.exp(sequence(moved, j) if term.ratio == "sequence" else moved[j])
            clipped = min(max(ratio, 1 - term.clip.low), 1 + term.clip.high) if term.clip else ratio
            one = max(-ratio * worth[j], -clipped * worth[j])
            if term.clip and term.clip.dual and worth[j] < 0:
                one = min(one, -term.clip.dual * worth[j])
            corrected = term.importance.sampler
            factor = min(sampler[j], corrected.cap) if corrected else 1.0
            total += weights[j] * factor * one
        return total

    return loss


def agree(naive, logits, found, loss):
    rows = logits.student.tolist()

    def flat(z):
        return loss([z[7 * j : 7 * j + 7] for j in range(5)])

    slopes = naive.slope(flat, [x for row in rows for x in row])
    assert found[0].item() == pytest.approx(loss(rows), abs=1e-12)
    assert_close(found[1].flatten(), torch.tensor(slopes, dtype=torch.float64), atol=1e-8, rtol=0)


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
def test_token_ratio(naive, logits, tokens, advantage, clip, importance, temperature):
    term = pull(advantage, clip=clip, importance=importance)
    loss = policy_loss(naive, term, logits, temperature, OLD)
    agree(naive, logits, figures(term, logits, tokens, temperature), loss)


@pytest.mark.parametrize("advantage", ADVANTAGES[5:], ids=str)
def test_without_a_teacher_prompt_the_reward_alone_counts(naive, logits, tokens, advantage):
    """Row 0 has one, row 2 has none: what the teacher says there is no matter."""
    taught = [True, True, False, False, False]
    tokens = evolve(tokens, has_teacher=torch.tensor(taught))
    other = SimpleNamespace(student=logits.student, teacher=logits.teacher.clone())
    other.teacher[2:] = torch.linspace(-3, 3, 7)
    term = pull(advantage, clip=CLIP)
    loss = policy_loss(naive, term, logits, 1.0, OLD, taught=taught)
    agree(naive, logits, figures(term, logits, tokens), loss)
    assert_close(figures(term, other, tokens)[:2], figures(term, logits, tokens)[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_sequence_ratio(naive, logits, tokens, clip, temperature):
    """The true gradient of the sequence's ratio: all tokens of a row have one weight here, as they do in collate."""
    even = [0.5, 0.0, 2.0, 2.0, 2.0]
    tokens = evolve(tokens, weights={"pull": torch.tensor(even)})
    term = pull(ratio="sequence", clip=clip)
    loss = policy_loss(naive, term, logits, temperature, OLD, even)
    agree(naive, logits, figures(term, logits, tokens, temperature), loss)


def test_a_sequence_ratio_has_one_value_and_each_tokens_own_factor(logits, tokens):
    """With factors that differ within a sequence a token keeps its own: the gradient of s_i sg(A_t) log S_t."""
    term = pull(LogRatio(), ratio="sequence")
    _, grad, stats = figures(term, logits, tokens)
    now, theirs = picked(logits.student), picked(logits.teacher)
    moved = (now - tokens.old_logprobs).detach()
    means = torch.stack([moved[0], moved[0], *[moved[2:].mean()] * 3])
    worth = theirs - tokens.old_logprobs
    loss = (-torch.tensor(WEIGHTS) * means.exp() * worth * now).sum()
    assert_close(grad, *torch.autograd.grad(loss, logits.student))
    assert_close(stats["pull/ratio"], means.exp()[COUNTED].sum())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=str)
def test_without_old_logprobs_the_ratio_is_one_with_a_gradient(naive, logits, tokens, advantage, ratio):
    tokens = evolve(tokens, old_logprobs=None)
    found = figures(pull(advantage, ratio=ratio, clip=CLIP), logits, tokens)
    held = logprobs(naive, logits.student.tolist(), 1.0)
    loss = policy_loss(naive, pull(advantage, clip=CLIP), logits, 1.0, held)
    agree(naive, logits, found, loss)
    assert found[2]["pull/ratio"] == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["k2", "vocabulary"])
def test_reference_kl(naive, logits, tokens, estimator, temperature):
    def loss(rows):
        total = 0.0
        for j in COUNTED:
            s = naive.softmax(rows[j], temperature)
            r = naive.softmax(logits.teacher[j].tolist(), temperature)
            y = TOKEN[j]
            one = 0.5 * (math.log(s[y]) - math.log(r[y])) ** 2
            total += WEIGHTS[j] * (one if estimator == "k2" else naive.kl(s, r))
        return total

    agree(naive, logits, figures(ReferenceKl(estimator=estimator), logits, tokens, temperature), loss)


def test_a_sampler_ratio_may_be_averaged_over_the_sequence(logits, tokens):
    sampler = SamplerRatio(cap=1.3, level="sequence_mean")
    found = figures(pull(importance=PolicyImportance(sampler=sampler)), logits, tokens)
    each = (torch.tensor(OLD) - torch.tensor(SAMPLER)).exp().clamp(max=1.3)
    mean = torch.stack([each[0], each[0], *[each[2:].mean()] * 3])
    by_hand = evolve(tokens, weights={"pull": torch.tensor(WEIGHTS) * mean})
    expected = figures(pull(), logits, by_hand)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("term", [pull(LogRatio(), clip=ClipSpec(low=0.2, high=0.2)), ReferenceKl(estimator="k2")])
def test_the_expected_gradient_is_that_of_the_reverse_kl(logits, tokens_of, term):
    """Enumerates the vocabulary: weight S_y for every y of one position."""
    student, other = logits.student[:1], logits.teacher[:1]
    every = tokens_of(range(7), weights={"pull": student.softmax(-1).detach()[0]})
    objective = Objective(Table({"pull": term}), 1.0)
    spread = other.expand(7, 7)
    loss, _ = objective(student.expand(7, 7), spread, every, spread)
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
def test_uncounted_tokens_and_the_order_of_rows_change_nothing(logits, tokens, term):
    """One token that does not count is impossible for the student, another one for both sides."""
    loss, grad, stats = figures(term, logits, tokens)
    student, other = logits.student.detach().clone(), logits.teacher.clone()
    student[1, TOKEN[1]] = -torch.inf
    forbidden = torch.zeros(1, 7, dtype=torch.float64)
    forbidden[0, 4] = -torch.inf
    student = torch.cat([student, forbidden]).requires_grad_()
    order = torch.tensor([2, 3, 4, 0, 1, 5])

    def mixed(x, value):
        return torch.cat([x, torch.full((1,), value, dtype=x.dtype)])[order]

    floats = ("old_logprobs", "sampler_logprobs", "advantages")
    other_order = evolve(
        tokens,
        token=mixed(tokens.token, 4),
        row=torch.tensor([0, 0, 0, 1, 1, 2]),
        weights={"pull": mixed(tokens.weights["pull"], 0)},
        **{name: mixed(getattr(tokens, name), -0.5) for name in floats},
    )
    given = SimpleNamespace(
        student=student[order].detach().requires_grad_(), teacher=torch.cat([other, forbidden])[order]
    )
    found = figures(term, given, other_order)
    back = found[1][order.argsort()]
    assert_close(found[0], loss)
    assert_close(back[COUNTED], grad[COUNTED])
    assert not back[[1, 5]].any()
    assert_close(found[2], stats)


@pytest.mark.parametrize("term", TERMS, ids=name_of)
def test_a_token_that_every_side_forbids_changes_nothing(logits, tokens, term):
    plain, grad, _ = figures(term, logits, tokens)
    never = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    wider = SimpleNamespace(
        student=torch.cat([logits.student.detach(), never], -1).requires_grad_(),
        teacher=torch.cat([logits.teacher, never], -1),
    )
    loss, wide, stats = figures(term, wider, tokens)
    assert_close(loss, plain)
    assert_close(wide[:, :7], grad)
    assert not wide[:, 7].any()
    assert all(torch.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("term", [*TERMS[2:], pull(AdvantageAdd())], ids=name_of)
def test_a_token_that_does_not_count_may_be_impossible_for_the_other_side(logits, tokens, term):
    loss, grad, stats = figures(term, logits, tokens)
    other = SimpleNamespace(student=logits.student, teacher=logits.teacher.clone())
    other.teacher[1, TOKEN[1]] = -torch.inf
    found = figures(term, other, tokens)
    assert_close(found[0], loss)
    assert_close(found[1], grad)
    assert_close(found[2], stats)


def test_zero_advantages_have_no_gradient(logits, tokens):
    tokens = evolve(tokens, advantages=torch.zeros(5))
    for ratio in ("token", "sequence"):
        loss, grad, _ = figures(pull(ratio=ratio, clip=CLIP), logits, tokens)
        assert loss == 0
        assert not grad.any()


def test_a_student_that_is_its_reference_stays(logits, tokens):
    same = SimpleNamespace(student=logits.student, teacher=logits.student.detach())
    for estimator in ("k2", "vocabulary"):
        loss, grad, _ = figures(ReferenceKl(estimator=estimator), same, tokens)
        assert abs(loss.item()) < 1e-12
        assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("term", TERMS, ids=name_of)
def test_a_chunk_without_tokens_has_a_graph_and_every_figure(logits, tokens, term):
    full = figures(term, logits, tokens)[2]
    losses = Table({"pull": term})
    none = with_first_pass(losses, logits, tokens).slice(0, 0)
    empty = SimpleNamespace(student=logits.student[:0], teacher=logits.teacher[:0])
    loss, stats = Objective(losses, 1.0)(empty.student, empty.teacher, none, empty.teacher)
    (grad,) = torch.autograd.grad(loss, logits.student)
    assert loss == 0
    assert not grad.any()
    assert stats.keys() == full.keys()
    assert all(x == 0 for x in stats.values())


def test_figures_of_a_policy_gradient(logits, tokens):
    clip = ClipSpec(low=0.3, high=0.4, dual=1.2)
    _, _, stats = figures(pull(clip=clip, coefficient=2.0), logits, tokens)
    now = picked(logits.student.detach())
    ratio, worth = (now - tokens.old_logprobs).exp()[COUNTED], tokens.advantages[COUNTED]
    low, high = (worth < 0) & (ratio < 0.7), (worth > 0) & (ratio > 1.4)
    dual = (worth < 0) & (ratio > 1.2)
    assert {k: v.item() for k, v in stats.items() if k != "pull/student_entropy"} == pytest.approx(
        {
            "loss/pull": figures(pull(clip=clip), logits, tokens)[0].item() * 2,
            "pull/tokens": 4,
            "pull/token_loss": stats["pull/token_loss"].item(),
            "pull/ratio": ratio.sum().item(),
            "pull/advantage": worth.sum().item(),
            "pull/clip_low": low.sum().item(),
            "pull/clip_high": high.sum().item(),
            "pull/clip_dual": dual.sum().item(),
            "pull/old_kl": (ratio - 1 - ratio.log()).sum().item(),
        }
    )
    assert 0 < low.sum() + high.sum() < 4
    assert 0 < dual.sum() < 4


def test_figures_of_a_reference_kl(naive, logits, tokens):
    for estimator in ("k2", "vocabulary"):
        stats = figures(ReferenceKl(estimator=estimator), logits, tokens)[2]
        sides = [
            (naive.softmax(logits.student[j].tolist()), naive.softmax(logits.teacher[j].tolist())) for j in COUNTED
        ]
        drawn = [TOKEN[j] for j in COUNTED]
        k1 = sum(math.log(s[y] / r[y]) for (s, r), y in zip(sides, drawn, strict=True))
        assert stats["pull/k1"].item() == pytest.approx(k1)
        assert stats["pull/reference_kl"].item() == pytest.approx(sum(naive.kl(*x) for x in sides))


def test_which_figures_a_term_has(logits, tokens):
    def keys(term):
        stats = figures(term, logits, tokens)[2]
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
def test_what_an_objective_needs(term, needs):
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
def test_what_is_missing_is_named(logits, tokens, term, missing, message):
    with pytest.raises(ValueError, match=message):
        Objective(Table({"pull": term}), 1.0)(logits.student, None, evolve(tokens, **missing))


def test_centring_without_a_teacher_is_an_error(tokens):
    losses = Table({"pull": pull(LogRatio(center="sequence"))})
    with pytest.raises(ValueError, match="needs the teacher's log-probabilities"):
        sequence_means(losses, torch.zeros(5), None, tokens, 3)


def test_a_misshapen_reference_is_an_error(logits, tokens):
    with pytest.raises(ValueError, match=r"student and reference differ in shape: \(5, 7\) and"):
        Objective(Table({"pull": ReferenceKl(estimator="k2")}), 1.0)(
            logits.student, None, tokens, logits.teacher[:, :6]
        )


def test_rewards_become_advantages_as_the_terms_say():
    rewards, group = torch.tensor([1.0, 0, 3, 3]), torch.tensor([0, 0, 1, 1])
    assert reward_advantages(Table({"imitate": CrossEntropy()}), rewards, group) is None
    assert reward_advantages(Table({"pull": pull(LogRatio())}), rewards, group) is None
    found = reward_advantages(Table({"pull": pull(), "again": pull(clip=CLIP)}), rewards, group)
    assert found.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_one_objective_has_one_advantage_of_the_reward():
    two = Table({"pull": pull(), "again": pull(GroupRelative(scale="group_std"))})
    with pytest.raises(ValueError, match="same group_relative advantage"):
        Objective(two, 1.0)


def test_sequence_means_are_over_the_tokens_that_a_term_counts(tokens):
    losses = Table({"pull": pull(ratio="sequence"), "again": pull(ratio="sequence")})
    tokens = evolve(tokens, weights={"pull": torch.tensor(WEIGHTS), "again": torch.tensor([0.0, 1, 1, 0, 0])})
    now = torch.tensor([-1.0, -1.5, -2.0, -1.0, -1.0], dtype=torch.float64)  # 0, ½, 1, −½, ½ up
    means = sequence_means(losses, now, None, tokens, 3)
    third = 1 / 3
    assert_close(means["pull/log_ratio"], torch.tensor([0, 0, third, third, third]).double())
    assert_close(means["again/log_ratio"], torch.tensor([0, 0.5, 1, 0, 0]).double())
    assert sequence_means(losses, now, None, evolve(tokens, old_logprobs=None), 3) == {}


def test_tokens_are_cut_and_moved_with_all_they_hold(tokens):
    whole = evolve(tokens, sequence_means={"pull/log_ratio": torch.arange(5.0)})
    part = whole.slice(2, 4).to(torch.device("cpu"))
    assert part.advantages.tolist() == WORTH[2:4]
    assert part.sequence_means["pull/log_ratio"].tolist() == [2.0, 3.0]
