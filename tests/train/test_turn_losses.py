"""Loss terms over trajectories of several turns: golden averages, no gradient from observations, padding, splits.

Values and gradients against plain numbers are in tests/parity (batches `turns`, `world`, `agreeing`, `discounted`, `acting`).
"""

import math

import pytest
import torch
from attrs import evolve
from one_rank import all_gather

import sdkit
from sdkit.language.specs import (
    CrossEntropy,
    Distillation,
    GroupRelative,
    LogRatio,
    MaskSpec,
    MethodSpec,
    PerSequence,
    PerToken,
    PerTurn,
    PolicyGradient,
    PolicyImportance,
    ReverseKl,
    SamplerRatio,
    StepAgreementWeight,
    Table,
    TextSpans,
    VocabularySupport,
)
from sdkit.losses.objective import Objective, with_sequence_statistics
from sdkit.losses.support import sampled_token
from sdkit.spans import Span
from sdkit.train.advantages import with_advantages
from sdkit.train.collate import collate
from sdkit.train.loss_masks import build_loss_masks

VOCABULARY = 5
LETTERS = "ab<> "
WORLD = MaskSpec(roles=("user", "tool"))


def turn(number, start, end):
    return Span(role="assistant", turn=number, start=start, end=end)


def observation(role, number, start, end):
    """With one token of the chat template on either side of its text."""
    return Span(role=role, turn=number, start=start, end=end, body=(start + 1, end - 1))


THREE = (turn(1, 0, 1), observation("user", 1, 1, 4), turn(2, 4, 6), observation("tool", 2, 6, 10), turn(3, 10, 11))
TWO = (turn(1, 0, 3), observation("tool", 1, 3, 6), turn(2, 6, 8))
SPANS = [THREE, (), TWO]
LENGTHS = [11, 2, 8]


def flat(spans, length, body=False):
    """Whether each position was sampled; with `body`, whether it is the text of an observation."""
    if not spans:
        return [not body] * length
    ranges = [s.body if body else (s.start, s.end) for s in spans if s.sampled != body]
    return [any(a <= p < b for a, b in ranges) for p in range(length)]


def marked(body=False):
    """[N, T] bool."""
    rows = [flat(spans, n, body) for spans, n in zip(SPANS, LENGTHS, strict=True)]
    return torch.tensor([row + [False] * (max(LENGTHS) - len(row)) for row in rows])


def numbers(seed, *last):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(LENGTHS), max(LENGTHS), *last, generator=draw, dtype=torch.float64)


def batch_of(changed=None):
    """Trajectories of three, one and two turns; `changed`: another seed for what stands at observations."""
    sampled = marked()
    draw = [torch.Generator().manual_seed(seed) for seed in (1, changed or 1)]
    ids = [torch.randint(VOCABULARY, sampled.shape, generator=g) for g in draw]
    logprobs = [[-numbers(seed, 1)[..., 0].abs() for seed in (k, (changed or 0) + k)] for k in (2, 3)]
    return sdkit.build_rollout_batch(
        torch.where(sampled, *ids),
        torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None],
        groups=torch.zeros(len(LENGTHS), dtype=torch.long),
        rewards=torch.tensor([1.0, 0.0, 0.0]),
        sampler_logprobs=torch.where(sampled, *logprobs[0]),
        old_logprobs=torch.where(sampled, *logprobs[1]),
        spans=SPANS,
    )


SAMPLER = PolicyImportance(sampler=SamplerRatio(cap=2.0, level="sequence_mean"))
TERMS = {
    "group": PolicyGradient(advantage=GroupRelative(), ratio="turn", average=PerTurn(), importance=SAMPLER),
    "discounted": PolicyGradient(advantage=LogRatio(discount=0.6, center="sequence"), ratio="sequence"),
    "agreement": Distillation(
        divergence=ReverseKl(), support=VocabularySupport(), weight=StepAgreementWeight(largest=1.3)
    ),
    "tagged": CrossEntropy(mask=MaskSpec(spans=TextSpans(pattern="[a<]+")), average=PerSequence()),
}


def objective_of(**losses):
    spec = MethodSpec(losses=Table(losses))
    return sdkit.build_objective(spec, decode=lambda ids: "".join(LETTERS[i] for i in ids))


def loss_and_gradient(losses, batch, logits, teacher):
    logits = logits.clone().requires_grad_()
    loss, metrics = objective_of(**losses)(batch, logits, teacher)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient, metrics


@pytest.mark.parametrize("world", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_observations_have_no_part_in_terms_of_sampled_tokens(name, world):
    """Other tokens, log-probabilities and logits there change nothing, also next to a term that counts them."""
    losses = {"term": TERMS[name]} | ({"world": CrossEntropy(mask=WORLD, coefficient=0.1)} if world else {})
    sampled, student, teacher = marked()[..., None], numbers(5, VOCABULARY), numbers(6, VOCABULARY)
    _, first, metrics = loss_and_gradient(losses, batch_of(), student, teacher)
    changed = [torch.where(sampled, x, numbers(7, VOCABULARY)) for x in (student, teacher)]
    _, second, again = loss_and_gradient(losses, batch_of(changed=40), *changed)
    torch.testing.assert_close(first * sampled, second * sampled, rtol=0, atol=1e-15)
    assert {k: v for k, v in again.items() if "term" in k} == pytest.approx(
        {k: v for k, v in metrics.items() if "term" in k}
    )
    moved = first.abs().sum(-1) > 0
    assert not (moved & ~marked() & ~marked(body=True)).any()
    assert (moved & marked(body=True)).any() == world
    if world:  # every token of an observation's text is predicted, and nothing around it
        assert torch.equal(moved & ~marked(), marked(body=True))


def test_a_term_beside_observations_is_what_it_is_alone():
    student, teacher = numbers(5, VOCABULARY), numbers(6, VOCABULARY)
    world = {"world": CrossEntropy(mask=WORLD, coefficient=0.1, average=PerTurn())}
    value, expected, _ = loss_and_gradient(world, batch_of(), student, teacher)
    for name, term in TERMS.items():
        own, gradient, _ = loss_and_gradient({name: term}, batch_of(), student, teacher)
        both = loss_and_gradient({name: term} | world, batch_of(), student, teacher)
        assert both[0] == pytest.approx(own + value, rel=1e-6)
        torch.testing.assert_close(both[1], gradient + expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("average", "expected"), [(PerToken(), 20 / 6), (PerSequence(), 3), (PerTurn(), 15.5 / 4)])
def test_golden_averages_of_one_and_three_turns(average, expected):
    """−log S is 1, 3 in the single turn, and 1 | 2, 3 | 10 in three; between them it is 7."""
    values = [[1, 7, 7, 2, 3, 7, 10], [1, 3]]
    spans = [
        (turn(1, 0, 1), observation("user", 1, 1, 3), turn(2, 3, 5), observation("user", 2, 5, 6), turn(3, 6, 7)),
        (),
    ]
    batch = sdkit.build_rollout_batch(
        torch.zeros(2, 7, dtype=torch.long), torch.arange(7) < torch.tensor([7, 2])[:, None], spans=spans
    )
    logits = torch.tensor(
        [[[-v, math.log(-math.expm1(-v))] for v in row + [1] * (7 - len(row))] for row in values], dtype=torch.float64
    )
    loss, _ = objective_of(term=CrossEntropy(average=average))(batch, logits)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_padding_is_not_read():
    student, teacher = numbers(5, VOCABULARY), numbers(6, VOCABULARY)
    losses = TERMS | {"world": CrossEntropy(mask=WORLD)}
    losses["discounted"] = evolve(losses["discounted"], ratio="token")
    value, gradient, _ = loss_and_gradient(losses, batch_of(), student, teacher)
    longer = [torch.cat([x, torch.full_like(x[:, :3], math.nan)], 1) for x in (student, teacher)]
    again = loss_and_gradient(losses, batch_of(), *longer)
    assert again[0] == value
    assert torch.equal(again[1][:, : max(LENGTHS)], gradient)


def test_advantage_is_one_per_trajectory_against_its_group():
    """Turns do not weigh in the group's mean: 1 − ⅓ at every sampled token of the success, −⅓ elsewhere."""
    losses = Table({"term": TERMS["group"]})
    batch = with_advantages(losses, batch_of(), all_gather, 100)
    assert [r.advantage for r in batch] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    batch = build_loss_masks(batch, losses, all_gather=all_gather)
    (part,) = collate(list(batch), losses, 10**6, torch.clone, torch.device("cpu")).micro_batches
    by_row = {2: -1 / 3, 8: -1 / 3, 11: 2 / 3}  # sorted by length
    lengths = [len(text.completion) for text in part.student.texts]
    assert part.tokens.advantages.tolist() == pytest.approx([by_row[lengths[row]] for row in part.tokens.row.tolist()])


def _loss(collated, losses, student, teacher):
    """The loss of a rank's micro-batches."""
    objective, rest, total = Objective(losses, 1.0), list(collated.order), 0.0
    for part in collated.micro_batches:
        rows, rest = rest[: part.rows], rest[part.rows :]
        at = [(r.row.index, p) for r, text in zip(rows, part.student.texts, strict=True) for p in text.positions]
        own, other = (x[tuple(torch.tensor(at, dtype=torch.long).reshape(-1, 2).T)] for x in (student, teacher))
        now, theirs = (sampled_token(x.log_softmax(-1), part.tokens.token) for x in (own, other))
        tokens = with_sequence_statistics(
            objective, part.tokens, part.rows, lambda now=now: now, lambda theirs=theirs: theirs
        )
        total += objective(own, other, tokens)[0].item()
    return total


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_split_over_micro_batches_and_ranks_changes_no_loss(cut, budget):
    losses = Table(
        {
            "group": TERMS["group"],
            "tagged": TERMS["tagged"],
            "log_ratio": PolicyGradient(advantage=LogRatio(discount=0.6)),
            "world": CrossEntropy(mask=WORLD),
        }
    )
    student, teacher = numbers(5, VOCABULARY), numbers(6, VOCABULARY)
    decode = lambda ids: "".join(LETTERS[i] for i in ids)  # noqa: E731
    batch = with_advantages(losses, batch_of(), all_gather, 100)
    rollouts = list(build_loss_masks(batch, losses, all_gather=all_gather, decode=decode))
    counts = []
    whole = collate(rollouts, losses, 10**6, lambda own: counts.append(own) or own, torch.device("cpu"))
    parts = [
        collate(part, losses, budget, lambda own: counts[0], torch.device("cpu"))
        for part in (rollouts[:cut], rollouts[cut:])
    ]
    assert len(parts[1].micro_batches) == (3 - cut if budget == 1 else 1)
    divided = sum(_loss(part, losses, student, teacher) for part in parts)
    assert divided == pytest.approx(_loss(whole, losses, student, teacher), rel=1e-6)


def test_weights_of_turns_are_relative_to_the_first_that_counts():
    """SOD: d = [.2, .4, .1] gives [1, .500001, 1.2]; without the first turn [1, 1.2]."""
    logprobs = {"student_logprobs": (-3.0,) * 11}
    teacher = [-2.8, 9, 9, 9, -2.6, -3.4, -9, -9, -9, -9, -3.1]
    trajectory = evolve(next(iter(batch_of())), token_statistics=logprobs | {"teacher_logprobs": tuple(teacher)})
    batch = evolve(batch_of(), rollouts=(trajectory,))
    term = evolve(TERMS["agreement"], weight=StepAgreementWeight(largest=1.2))

    def weights(mask):
        built = build_loss_masks(batch, Table({"term": evolve(term, mask=mask)}), all_gather=all_gather)
        return next(iter(built)).loss_masks["term"].weights

    assert weights(MaskSpec()) == pytest.approx([1, 0.500001, 0.500001, 1.2], abs=1e-6)
    assert weights(MaskSpec(skip_first=1)) == pytest.approx([1, 1, 1.2], abs=1e-6)


def test_pattern_without_text_is_an_error():
    with pytest.raises(ValueError, match="pass decode"):
        build_loss_masks(batch_of(), Table({"term": TERMS["tagged"]}), all_gather=all_gather)
