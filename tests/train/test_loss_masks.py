"""Loss masks: counted tokens and weights of ragged rollouts, against plain loops, over ranks, and with no tokens."""

import math
import random
import threading

import pytest
import torch
from attrs import evolve
from one_rank import all_gather

from sdkit.batches import Rollout, RolloutBatch, Row
from sdkit.language.specs import (
    CrossEntropy,
    Distillation,
    DriftWeight,
    FileWeight,
    ForwardKl,
    GroupRelative,
    LogRatio,
    MaskSpec,
    PassRateWeight,
    PerplexityWeight,
    PerSequence,
    PerToken,
    PolicyGradient,
    PositionWeight,
    RouteSpec,
    Table,
    TeacherEntropyWeight,
    VocabularySupport,
)
from sdkit.train.advantages import with_advantages
from sdkit.train.collate import collate
from sdkit.train.loss_masks import build_loss_masks

SPECIAL = {7, 9}
GROUP = 3


def rollout(draw, group, length, reward, teacher=True):
    def numbers(low, high):
        return tuple(draw.uniform(low, high) for _ in range(length))

    statistics = {"student_logprobs": numbers(-4, 0), "student_entropy": numbers(0, 3)}
    if teacher:
        statistics |= {"teacher_logprobs": numbers(-4, 0), "teacher_entropy": numbers(0, 3)}
    return Rollout(
        row=Row(index=0, messages=({"role": "user", "content": "x"},), columns={}, raw={}),
        group=group,
        prompt_ids=(1, 2),
        teacher_prompt_ids=(3, 4, 5) if teacher else None,
        completion_ids=tuple(draw.randrange(6, 12) for _ in range(length)),
        sampler_logprobs=None,
        policy_version=0,
        finished=True,
        reward=reward,
        token_statistics=statistics,
    )


@pytest.fixture
def batch():
    """Four groups of three, ragged: one rollout without tokens, two without a teacher, one group with equal rewards."""
    draw = random.Random(3)
    lengths = [5, 1, 8, 3, 3, 0, 12, 2, 4, 6, 6, 1]
    rewards = [1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0]
    rollouts = [
        rollout(draw, i // GROUP, n, float(r), teacher=i not in (1, 9))
        for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    ]
    by_group = [tuple(r.reward for r in rollouts if r.group == g) for g in range(4)]
    return RolloutBatch(rollouts=tuple(evolve(r, group_rewards=by_group[r.group]) for r in rollouts))


def distil(mask=None, **changes):
    parts = {"divergence": ForwardKl(), "support": VocabularySupport()}
    return Distillation(mask=mask or MaskSpec(), **(parts | changes))


def imitate(mask=None, **changes):
    return CrossEntropy(mask=mask or MaskSpec(), **changes)


def loss_masks_of(batch, term, **options):
    options = {"all_gather": all_gather, "special": SPECIAL} | options
    return [r.loss_masks["term"] for r in build_loss_masks(batch, Table({"term": term}), **options)]


def tokens_where(batch, keep):
    """(rollout, position) of each token for which `keep` is true."""
    return [(i, p) for i, r in enumerate(batch) for p in range(len(r.completion_ids)) if keep(r, p)]


def counted_tokens(masks):
    return [(i, p) for i, mask in enumerate(masks) for p in mask.positions]


def token_weights(masks):
    return [w for mask in masks for w in mask.weights or ()]


def has_teacher(r, p):
    return r.teacher_prompt_ids is not None


def test_special_tokens_are_left_out(batch):
    masks = loss_masks_of(batch, imitate(MaskSpec(special_tokens="leave_out")))
    assert counted_tokens(masks) == tokens_where(batch, lambda r, p: r.completion_ids[p] not in SPECIAL)


def test_teacher_entropy_mask_counts_tokens_above_the_threshold(batch):
    masks = loss_masks_of(batch, distil(MaskSpec(teacher_entropy_above=0.8, skip_first=1)))
    expected = tokens_where(
        batch, lambda r, p: has_teacher(r, p) and p > 0 and r.token_statistics["teacher_entropy"][p] > 0.8
    )
    assert counted_tokens(masks) == expected
    assert expected


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_top_share_is_taken_of_the_remaining_tokens(batch, share):
    mask = MaskSpec(student_entropy_top=share, special_tokens="leave_out", prefix=4)
    remaining = tokens_where(batch, lambda r, p: p < 4 and r.completion_ids[p] not in SPECIAL)
    entropy = {(i, p): list(batch)[i].token_statistics["student_entropy"][p] for i, p in remaining}
    largest = sorted(remaining, key=entropy.__getitem__, reverse=True)[: math.ceil(share * len(remaining))]
    assert counted_tokens(loss_masks_of(batch, imitate(mask))) == sorted(largest)


def test_tokens_below_the_floor_are_left_out(batch):
    def ratio(r, p):
        return r.token_statistics["teacher_logprobs"][p] - r.token_statistics["student_logprobs"][p]

    for below, keep in (("leave_out", lambda r, p: ratio(r, p) >= -1), ("clamp", lambda r, p: True)):
        term = PolicyGradient(advantage=LogRatio(floor=-1.0, below_floor=below))
        expected = tokens_where(batch, lambda r, p, keep=keep: has_teacher(r, p) and keep(r, p))
        assert counted_tokens(loss_masks_of(batch, term)) == expected


def test_teacher_weight_counts_only_rollouts_with_a_teacher(batch):
    masks = loss_masks_of(batch, imitate(weight=TeacherEntropyWeight(rate=1.0)))
    assert counted_tokens(masks) == tokens_where(batch, has_teacher)


def test_position_weight_uses_the_full_completion(batch):
    weight = PositionWeight(smallest=0.25, middle=0.3, width=0.1)
    masks = loss_masks_of(batch, imitate(MaskSpec(skip_first=2), weight=weight))
    expected = [
        0.25 + 0.75 / (1 + math.exp(-((p + 1) / len(list(batch)[i].completion_ids) - 0.3) / 0.1))
        for i, p in counted_tokens(masks)
    ]
    assert token_weights(masks) == pytest.approx(expected)


def test_teacher_entropy_weights_have_mean_one(batch):
    masks = loss_masks_of(batch, distil(weight=TeacherEntropyWeight(rate=1.5)))
    raw = [math.exp(-1.5 * list(batch)[i].token_statistics["teacher_entropy"][p]) for i, p in counted_tokens(masks)]
    assert token_weights(masks) == pytest.approx([w * len(raw) / sum(raw) for w in raw])


def test_drift_covers_the_counted_tokens_of_each_rollout(batch):
    masks = loss_masks_of(batch, distil(MaskSpec(skip_first=1), weight=DriftWeight(strength=0.5)))
    for r, mask in zip(batch, masks, strict=True):
        teacher, student = (r.token_statistics.get("teacher_logprobs"), r.token_statistics["student_logprobs"])
        gaps = [abs(teacher[p] - student[p]) for p in mask.positions]
        expected = [1 + 0.5 * (1 - sum(gaps[:t]) / sum(gaps)) for t in range(len(gaps))]
        assert mask.weights == pytest.approx(expected)


def test_pass_rates_are_those_of_the_group_as_sampled(batch):
    term = distil(weight=PassRateWeight(power=0.5))
    masks = loss_masks_of(batch, term)
    rates = [1 / 3, 0, 1, 1 / 3]
    for r, mask in zip(batch, masks, strict=True):
        p = rates[r.group]
        assert mask.weights == pytest.approx([math.sqrt(p * (1 - p))] * len(mask.weights))
        # Tokens with weight 0 count in the average too.
        assert len(mask.positions) == (len(r.completion_ids) if has_teacher(r, 0) else 0)
    fewer = RolloutBatch(rollouts=tuple(batch)[1:])  # a filter may have dropped a rollout
    assert token_weights(loss_masks_of(fewer, term)) == token_weights(masks[1:])


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_perplexity_covers_the_counted_rollouts_of_the_group(batch, role):
    weight = PerplexityWeight(of=role, power=-0.5)
    route = RouteSpec(when="failed", then=("term",))
    masks = loss_masks_of(batch, imitate(weight=weight), route=route)
    powers = {}
    for i, mask in enumerate(masks):
        if mask.positions:
            logprobs = list(batch)[i].token_statistics[f"{role}_logprobs"]
            powers[i] = math.exp(-sum(logprobs) / len(logprobs)) ** -0.5
    assert powers
    for i in powers:
        peers = [w for j, w in powers.items() if list(batch)[j].group == list(batch)[i].group]
        expected = powers[i] * len(peers) / sum(peers)
        assert masks[i].weights == pytest.approx([expected] * len(masks[i].positions))


@pytest.mark.parametrize("rows", ["rollout", "group"])
def test_user_weight_gets_rollouts_or_groups(batch, rows):
    names = ("position", "length", "reward", "student_entropy")
    weight = FileWeight(file="mine.py", function="weigh", given=names, rows=rows)
    calls = []

    def weigh(counts, features):
        calls.append(counts)
        for name in ("position", "student_entropy"):
            assert not features[name][~counts].any()
        return features["student_entropy"] + features["position"] + 100 * features["reward"][:, None]

    term = imitate(MaskSpec(skip_first=1), weight=weight)
    masks = loss_masks_of(batch, term, functions={"term": weigh})
    assert [len(c) for c in calls] == ([12] if rows == "rollout" else [3, 3, 3, 3])
    rollouts = list(batch)
    expected = [
        rollouts[i].token_statistics["student_entropy"][p] + p + 100 * rollouts[i].reward
        for i, p in counted_tokens(masks)
    ]
    assert token_weights(masks) == pytest.approx(expected)
    assert loss_masks_of(RolloutBatch(rollouts=()), term, functions={"term": weigh}) == []


@pytest.mark.parametrize("when", ["failed", "failed_with_context"])
def test_route_sends_each_rollout_to_one_branch(batch, when):
    losses = Table({"wrong": imitate(), "right": imitate(), "all": imitate()})
    route = RouteSpec(when=when, then=("wrong",), otherwise=("right",))
    routed = build_loss_masks(batch, losses, all_gather=all_gather, route=route)
    for r in routed:
        with_context = when == "failed" or r.teacher_prompt_ids is not None
        branch = "then" if r.reward < 1 and with_context else "otherwise"
        assert r.branch == branch
        all_positions = tuple(range(len(r.completion_ids)))
        assert r.loss_masks["wrong"].positions == (all_positions if branch == "then" else ())
        assert r.loss_masks["right"].positions == (all_positions if branch == "otherwise" else ())
        assert r.loss_masks["all"].positions == all_positions


def test_missing_quantity_is_an_error(batch):
    without_statistics = RolloutBatch(rollouts=tuple(evolve(r, token_statistics={}, reward=None) for r in batch))
    with pytest.raises(ValueError, match="student_entropy was not computed"):
        loss_masks_of(without_statistics, imitate(MaskSpec(student_entropy_top=0.2)))
    with pytest.raises(ValueError, match="rewards"):
        loss_masks_of(without_statistics, imitate(), route=RouteSpec(when="failed", then=("term",)))
    without_group_rewards = RolloutBatch(rollouts=tuple(evolve(r, group_rewards=()) for r in batch))
    with pytest.raises(ValueError, match="group's rewards"):
        loss_masks_of(without_group_rewards, imitate(weight=PassRateWeight()))
    with pytest.raises(ValueError, match="no loss mask"):
        collate(list(batch), Table({"term": imitate()}), 100, torch.clone, torch.device("cpu"))


class Ranks:
    """Ranks as threads; `all_gather` returns the values of all threads in rank order."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = (size, [None] * size, threading.Barrier(size, timeout=20))

    def run(self, job):
        out = [None] * self.size

        def run_rank(rank):
            out[rank] = job(rank, lambda values: self.all_gather(rank, values))

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.size)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return out

    def all_gather(self, rank, values):
        self.slots[rank] = values
        self.barrier.wait()
        start = sum(len(v) for v in self.slots[:rank])
        joined = torch.cat(self.slots)
        self.barrier.wait()
        return joined, slice(start, start + len(values))


TERMS = {
    "top": distil(MaskSpec(student_entropy_top=0.3)),
    "entropy": distil(weight=TeacherEntropyWeight(rate=1.0)),
    "both": distil(MaskSpec(student_entropy_top=0.6), weight=TeacherEntropyWeight(rate=0.5)),
    "drift": distil(weight=DriftWeight(strength=1.0)),
    "perplexity": distil(weight=PerplexityWeight(of="teacher")),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("cut", [0, 3, 6, 12])
def test_masks_over_two_ranks_equal_one(batch, term, cut):
    """Groups are divided between two ranks, in one case all to one rank."""
    expected = loss_masks_of(batch, term)
    rollouts = tuple(batch)
    parts = [RolloutBatch(rollouts=part) for part in (rollouts[:cut], rollouts[cut:])]
    out = Ranks(2).run(lambda rank, all_gather: loss_masks_of(parts[rank], term, all_gather=all_gather))
    joined = [mask for part in out for mask in part]
    assert counted_tokens(joined) == counted_tokens(expected)
    assert token_weights(joined) == pytest.approx(token_weights(expected))


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("cut", [0, 3, 9])
def test_advantages_use_the_std_of_all_ranks(batch, scale, cut):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative(scale=scale))})
    expected = [r.advantage for r in with_advantages(losses, batch, all_gather, 12)]
    rollouts = tuple(batch)
    parts = [RolloutBatch(rollouts=part) for part in (rollouts[:cut], rollouts[cut:])]
    out = Ranks(2).run(lambda rank, all_gather: with_advantages(losses, parts[rank], all_gather, 12))
    joined = [r.advantage for part in out for r in part]
    assert joined == pytest.approx(expected)
    assert len(set(joined)) > 1


def collate_masked(batch, losses, budget=100, **options):
    masked = build_loss_masks(batch, losses, all_gather=all_gather, special=SPECIAL, **options)
    return collate(list(masked), losses, budget, torch.clone, torch.device("cpu"))


def collated_weights(result, name):
    return torch.cat([m.tokens.weights[name] for m in result.micro_batches])


def test_joint_terms_share_one_denominator(batch):
    joint = PerToken(denominator="joint")
    losses = Table({"wrong": imitate(average=joint), "right": imitate(average=joint), "own": imitate()})
    result = collate_masked(batch, losses, route=RouteSpec(when="failed", then=("wrong",), otherwise=("right",)))
    tokens = {name: c.tokens for name, c in result.counts.items()}
    total = tokens["wrong"] + tokens["right"]
    assert 0 < tokens["wrong"] < total == tokens["own"]
    for name in ("wrong", "right"):
        weights = collated_weights(result, name)
        counts = weights[weights > 0].tolist()
        assert counts == pytest.approx([1 / total] * tokens[name])
    assert collated_weights(result, "own").sum() == pytest.approx(1)


def test_term_can_divide_by_the_tokens_of_all_completions(batch):
    """Tokens that a mask leaves out stay in the denominator: Σ over counted tokens / all 51 tokens."""
    completions = PerToken(denominator="completions")
    gated = distil(MaskSpec(teacher_entropy_above=1.0))
    losses = Table({"gated": evolve(gated, average=completions), "own": gated, "rest": imitate()})
    result = collate_masked(batch, losses)
    tokens = result.counts["gated"].tokens
    assert 0 < tokens == result.counts["own"].tokens < 51 == result.counts["rest"].tokens
    assert collated_weights(result, "gated").sum() == pytest.approx(tokens / 51)
    assert collated_weights(result, "gated").max() == pytest.approx(1 / 51)
    assert collated_weights(result, "own").sum() == pytest.approx(1)


@pytest.mark.parametrize("budget", [20, 60, 10**6])
def test_split_into_micro_batches_changes_no_weight(batch, budget):
    losses = Table(
        {
            "top": distil(MaskSpec(student_entropy_top=0.4), weight=TeacherEntropyWeight(rate=1.0)),
            "rows": imitate(weight=DriftWeight(strength=0.5), average=PerSequence(empty_rows="count")),
            "joint": imitate(average=PerToken(denominator="joint")),
        }
    )
    split, unsplit = collate_masked(batch, losses, budget), collate_masked(batch, losses)
    assert split.counts == unsplit.counts
    for name in losses:
        # The order of rollouts depends only on their lengths.
        a, b = collated_weights(split, name), collated_weights(unsplit, name)
        assert a[a > 0].tolist() == pytest.approx(b[b > 0].tolist())


def test_split_batch_keeps_its_weights(batch):
    term = distil(MaskSpec(student_entropy_top=0.4), weight=TeacherEntropyWeight(rate=1.0))
    losses = Table({"term": term})
    masked = build_loss_masks(batch, losses, all_gather=all_gather)
    masks = [r.loss_masks["term"] for part in masked.split(2) for r in part]
    assert [c.positions for c in masks] == [r.loss_masks["term"].positions for r in masked]
    assert sum(map(sum, (c.weights for c in masks))) == pytest.approx(sum(len(c.positions) for c in masks))
    # Each part is divided by its own number of tokens, as without weights.
    part = masked.split(2)[0]
    result = collate(list(part), losses, 100, torch.clone, torch.device("cpu"))
    tokens = sum(len(r.loss_masks["term"].positions) for r in part)
    total_weight = sum(sum(r.loss_masks["term"].weights) for r in part)
    assert result.counts["term"].tokens == tokens
    assert collated_weights(result, "term").sum() == pytest.approx(total_weight / tokens)


ALL_WEIGHTS = [
    PositionWeight(smallest=0.25, middle=0.3, width=0.1),
    TeacherEntropyWeight(rate=1.0),
    DriftWeight(strength=0.5),
    PassRateWeight(),
    PerplexityWeight(of="student"),
]


@pytest.mark.parametrize("weight", ALL_WEIGHTS, ids=lambda w: w.kind)
def test_no_counted_tokens_have_no_weight(batch, weight):
    term = distil(MaskSpec(student_entropy_top=0.5, skip_first=100), weight=weight)
    for rollouts in (tuple(batch), ()):
        masks = loss_masks_of(RolloutBatch(rollouts=rollouts), term)
        assert token_weights(masks) == []
        assert len(masks) == len(rollouts)
    weights = collated_weights(collate_masked(batch, Table({"term": term, "other": imitate()})), "term")
    assert weights.tolist() == [0.0] * len(weights)
