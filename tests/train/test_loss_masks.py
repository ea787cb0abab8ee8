"""Which tokens count and what they weigh, over ragged rollouts: against plain loops, over ranks, and where nothing counts."""

import math
import random
import threading

import pytest
import torch
from attrs import evolve

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


def alone(values):
    return values, slice(0, len(values))


def rollout(draw, group, length, reward, teacher=True):
    def numbers(low, high):
        return tuple(draw.uniform(low, high) for _ in range(length))

    measures = {"student_logprobs": numbers(-4, 0), "student_entropy": numbers(0, 3)}
    if teacher:
        measures |= {"teacher_logprobs": numbers(-4, 0), "teacher_entropy": numbers(0, 3)}
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
        token_statistics=measures,
    )


@pytest.fixture
def batch():
    """Four groups of three: ragged, one rollout without tokens, two without a teacher, one group all right."""
    draw = random.Random(3)
    lengths = [5, 1, 8, 3, 3, 0, 12, 2, 4, 6, 6, 1]
    rewards = [1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0]
    made = [
        rollout(draw, i // GROUP, n, float(r), teacher=i not in (1, 9))
        for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    ]
    by_group = [tuple(r.reward for r in made if r.group == g) for g in range(4)]
    return RolloutBatch(rollouts=tuple(evolve(r, group_rewards=by_group[r.group]) for r in made))


def distil(mask=None, **changes):
    parts = {"divergence": ForwardKl(), "support": VocabularySupport()}
    return Distillation(mask=mask or MaskSpec(), **(parts | changes))


def imitate(mask=None, **changes):
    return CrossEntropy(mask=mask or MaskSpec(), **changes)


def count(batch, term, **given):
    given = {"all_gather": alone, "special": SPECIAL} | given
    return [r.loss_masks["term"] for r in build_loss_masks(batch, Table({"term": term}), **given)]


def places(batch, keep):
    """(rollout, position) of each token that `keep` wants."""
    return [(i, p) for i, r in enumerate(batch) for p in range(len(r.completion_ids)) if keep(r, p)]


def found_places(found):
    return [(i, p) for i, counted in enumerate(found) for p in counted.positions]


def found_weights(found):
    return [w for counted in found for w in counted.weights or ()]


def taught(r, p):
    return r.teacher_prompt_ids is not None


def test_special_tokens_are_left_out(batch):
    found = count(batch, imitate(MaskSpec(special_tokens="leave_out")))
    assert found_places(found) == places(batch, lambda r, p: r.completion_ids[p] not in SPECIAL)


def test_only_where_the_teacher_is_unsure(batch):
    found = count(batch, distil(MaskSpec(teacher_entropy_above=0.8, skip_first=1)))
    wanted = places(batch, lambda r, p: taught(r, p) and p > 0 and r.token_statistics["teacher_entropy"][p] > 0.8)
    assert found_places(found) == wanted
    assert wanted


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_top_share_is_of_the_tokens_that_are_left(batch, share):
    mask = MaskSpec(student_entropy_top=share, special_tokens="leave_out", prefix=4)
    left = places(batch, lambda r, p: p < 4 and r.completion_ids[p] not in SPECIAL)
    entropy = {(i, p): list(batch)[i].token_statistics["student_entropy"][p] for i, p in left}
    kept = sorted(left, key=entropy.__getitem__, reverse=True)[: math.ceil(share * len(left))]
    assert found_places(count(batch, imitate(mask))) == sorted(kept)


def test_tokens_below_the_floor_are_left_out(batch):
    def ratio(r, p):
        return r.token_statistics["teacher_logprobs"][p] - r.token_statistics["student_logprobs"][p]

    for below, keep in (("leave_out", lambda r, p: ratio(r, p) >= -1), ("clamp", lambda r, p: True)):
        term = PolicyGradient(advantage=LogRatio(floor=-1.0, below_floor=below))
        wanted = places(batch, lambda r, p, keep=keep: taught(r, p) and keep(r, p))
        assert found_places(count(batch, term)) == wanted


def test_a_term_that_weighs_by_the_teacher_counts_no_rollout_without_one(batch):
    found = count(batch, imitate(weight=TeacherEntropyWeight(rate=1.0)))
    assert found_places(found) == places(batch, taught)


def test_position_is_of_the_whole_completion(batch):
    weight = PositionWeight(smallest=0.25, middle=0.3, width=0.1)
    found = count(batch, imitate(MaskSpec(skip_first=2), weight=weight))
    wanted = [
        0.25 + 0.75 / (1 + math.exp(-((p + 1) / len(list(batch)[i].completion_ids) - 0.3) / 0.1))
        for i, p in found_places(found)
    ]
    assert found_weights(found) == pytest.approx(wanted)


def test_sure_teachers_count_more_and_the_mean_is_one(batch):
    found = count(batch, distil(weight=TeacherEntropyWeight(rate=1.5)))
    raw = [math.exp(-1.5 * list(batch)[i].token_statistics["teacher_entropy"][p]) for i, p in found_places(found)]
    assert found_weights(found) == pytest.approx([w * len(raw) / sum(raw) for w in raw])


def test_drift_is_over_the_counted_tokens_of_each_rollout(batch):
    found = count(batch, distil(MaskSpec(skip_first=1), weight=DriftWeight(strength=0.5)))
    for r, counted in zip(batch, found, strict=True):
        told, own = (r.token_statistics.get("teacher_logprobs"), r.token_statistics["student_logprobs"])
        gaps = [abs(told[p] - own[p]) for p in counted.positions]
        wanted = [1 + 0.5 * (1 - sum(gaps[:t]) / sum(gaps)) for t in range(len(gaps))]
        assert counted.weights == pytest.approx(wanted)


def test_pass_rates_are_those_of_the_group_as_sampled(batch):
    term = distil(weight=PassRateWeight(power=0.5))
    found = count(batch, term)
    rates = [1 / 3, 0, 1, 1 / 3]
    for r, counted in zip(batch, found, strict=True):
        p = rates[r.group]
        assert counted.weights == pytest.approx([math.sqrt(p * (1 - p))] * len(counted.weights))
        # All of them count in the average, also those of weight 0.
        assert len(counted.positions) == (len(r.completion_ids) if taught(r, 0) else 0)
    fewer = RolloutBatch(rollouts=tuple(batch)[1:])  # a filter may have dropped one
    assert found_weights(count(fewer, term)) == found_weights(found[1:])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_perplexity_is_of_the_rollouts_that_count_in_the_group(batch, who):
    weight = PerplexityWeight(of=who, power=-0.5)
    route = RouteSpec(when="failed", then=("term",))
    found = count(batch, imitate(weight=weight), route=route)
    worth = {}
    for i, counted in enumerate(found):
        if counted.positions:
            told = list(batch)[i].token_statistics[f"{who}_logprobs"]
            worth[i] = math.exp(-sum(told) / len(told)) ** -0.5
    assert worth
    for i in worth:
        peers = [w for j, w in worth.items() if list(batch)[j].group == list(batch)[i].group]
        wanted = worth[i] * len(peers) / sum(peers)
        assert found[i].weights == pytest.approx([wanted] * len(found[i].positions))


@pytest.mark.parametrize("rows", ["rollout", "group"])
def test_a_users_function_is_handed_rollouts_or_groups(batch, rows):
    given = ("position", "length", "reward", "student_entropy")
    weight = FileWeight(file="mine.py", function="weigh", given=given, rows=rows)
    calls = []

    def weigh(counts, features):
        calls.append(counts)
        for name in ("position", "student_entropy"):
            assert not features[name][~counts].any()
        return features["student_entropy"] + features["position"] + 100 * features["reward"][:, None]

    term = imitate(MaskSpec(skip_first=1), weight=weight)
    found = count(batch, term, functions={"term": weigh})
    assert [len(c) for c in calls] == ([12] if rows == "rollout" else [3, 3, 3, 3])
    held = list(batch)
    wanted = [
        held[i].token_statistics["student_entropy"][p] + p + 100 * held[i].reward for i, p in found_places(found)
    ]
    assert found_weights(found) == pytest.approx(wanted)
    assert count(RolloutBatch(rollouts=()), term, functions={"term": weigh}) == []


@pytest.mark.parametrize("when", ["failed", "failed_with_context"])
def test_a_route_sends_each_rollout_to_one_branch(batch, when):
    losses = Table({"wrong": imitate(), "right": imitate(), "all": imitate()})
    route = RouteSpec(when=when, then=("wrong",), otherwise=("right",))
    routed = build_loss_masks(batch, losses, all_gather=alone, route=route)
    for r in routed:
        with_context = when == "failed" or r.teacher_prompt_ids is not None
        branch = "then" if r.reward < 1 and with_context else "otherwise"
        assert r.branch == branch
        whole = tuple(range(len(r.completion_ids)))
        assert r.loss_masks["wrong"].positions == (whole if branch == "then" else ())
        assert r.loss_masks["right"].positions == (whole if branch == "otherwise" else ())
        assert r.loss_masks["all"].positions == whole


def test_what_is_not_known_is_an_error(batch):
    blind = RolloutBatch(rollouts=tuple(evolve(r, token_statistics={}, reward=None) for r in batch))
    with pytest.raises(ValueError, match="student_entropy was not computed"):
        count(blind, imitate(MaskSpec(student_entropy_top=0.2)))
    with pytest.raises(ValueError, match="rewards"):
        count(blind, imitate(), route=RouteSpec(when="failed", then=("term",)))
    lone = RolloutBatch(rollouts=tuple(evolve(r, group_rewards=()) for r in batch))
    with pytest.raises(ValueError, match="group's rewards"):
        count(lone, imitate(weight=PassRateWeight()))
    with pytest.raises(ValueError, match="no loss mask"):
        collate(list(batch), Table({"term": imitate()}), 100, torch.clone, torch.device("cpu"))


class Ranks:
    """Ranks as threads; what each gives to `all_gather` is handed to all, in order."""

    def __init__(self, size):
        self.size, self.held, self.barrier = (size, [None] * size, threading.Barrier(size, timeout=20))

    def run(self, job):
        out = [None] * self.size

        def one(rank):
            out[rank] = job(rank, lambda values: self.all_gather(rank, values))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return out

    def all_gather(self, rank, values):
        self.held[rank] = values
        self.barrier.wait()
        start = sum(len(v) for v in self.held[:rank])
        joined = torch.cat(self.held)
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
def test_ranks_count_as_one(batch, term, cut):
    """Groups are dealt to two ranks, also all to one of them."""
    whole = count(batch, term)
    rollouts = tuple(batch)
    parts = [RolloutBatch(rollouts=part) for part in (rollouts[:cut], rollouts[cut:])]
    out = Ranks(2).run(lambda rank, all_gather: count(parts[rank], term, all_gather=all_gather))
    joined = [counted for part in out for counted in part]
    assert found_places(joined) == found_places(whole)
    assert found_weights(joined) == pytest.approx(found_weights(whole))


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("cut", [0, 3, 9])
def test_advantages_take_the_spread_of_all_ranks(batch, scale, cut):
    losses = Table({"policy": PolicyGradient(advantage=GroupRelative(scale=scale))})
    whole = [r.advantage for r in with_advantages(losses, batch, alone, 12)]
    rollouts = tuple(batch)
    parts = [RolloutBatch(rollouts=part) for part in (rollouts[:cut], rollouts[cut:])]
    out = Ranks(2).run(lambda rank, all_gather: with_advantages(losses, parts[rank], all_gather, 12))
    joined = [r.advantage for part in out for r in part]
    assert joined == pytest.approx(whole)
    assert len(set(joined)) > 1


def collated(batch, losses, budget=100, **given):
    counted = build_loss_masks(batch, losses, all_gather=alone, special=SPECIAL, **given)
    return collate(list(counted), losses, budget, torch.clone, torch.device("cpu"))


def weights_of(found, name):
    return torch.cat([m.tokens.weights[name] for m in found.micro_batches])


def test_joint_terms_share_one_denominator(batch):
    joint = PerToken(denominator="joint")
    losses = Table({"wrong": imitate(average=joint), "right": imitate(average=joint), "own": imitate()})
    found = collated(batch, losses, route=RouteSpec(when="failed", then=("wrong",), otherwise=("right",)))
    tokens = {name: c.tokens for name, c in found.counts.items()}
    whole = tokens["wrong"] + tokens["right"]
    assert 0 < tokens["wrong"] < whole == tokens["own"]
    for name in ("wrong", "right"):
        weights = weights_of(found, name)
        counts = weights[weights > 0].tolist()
        assert counts == pytest.approx([1 / whole] * tokens[name])
    assert weights_of(found, "own").sum() == pytest.approx(1)


def test_a_term_may_divide_by_the_tokens_of_all_completions(batch):
    """What a gate leaves out stays in the denominator: Σ over gated tokens / all 51 tokens, whoever has a teacher."""
    whole = PerToken(denominator="completions")
    gated = distil(MaskSpec(teacher_entropy_above=1.0))
    losses = Table({"gated": evolve(gated, average=whole), "own": gated, "rest": imitate()})
    found = collated(batch, losses)
    tokens = found.counts["gated"].tokens
    assert 0 < tokens == found.counts["own"].tokens < 51 == found.counts["rest"].tokens
    assert weights_of(found, "gated").sum() == pytest.approx(tokens / 51)
    assert weights_of(found, "gated").max() == pytest.approx(1 / 51)
    assert weights_of(found, "own").sum() == pytest.approx(1)


@pytest.mark.parametrize("budget", [20, 60, 10**6])
def test_the_cut_into_micro_batches_changes_no_weight(batch, budget):
    losses = Table(
        {
            "top": distil(MaskSpec(student_entropy_top=0.4), weight=TeacherEntropyWeight(rate=1.0)),
            "rows": imitate(weight=DriftWeight(strength=0.5), average=PerSequence(empty_rows="count")),
            "joint": imitate(average=PerToken(denominator="joint")),
        }
    )
    found, whole = collated(batch, losses, budget), collated(batch, losses)
    assert found.counts == whole.counts
    for name in losses:
        # The order of rollouts depends on their lengths alone.
        a, b = weights_of(found, name), weights_of(whole, name)
        assert a[a > 0].tolist() == pytest.approx(b[b > 0].tolist())


def test_weights_of_a_batch_dealt_into_parts_are_the_batchs(batch):
    term = distil(MaskSpec(student_entropy_top=0.4), weight=TeacherEntropyWeight(rate=1.0))
    losses = Table({"term": term})
    counted = build_loss_masks(batch, losses, all_gather=alone)
    dealt = [r.loss_masks["term"] for part in counted.split(2) for r in part]
    assert [c.positions for c in dealt] == [r.loss_masks["term"].positions for r in counted]
    assert sum(map(sum, (c.weights for c in dealt))) == pytest.approx(sum(len(c.positions) for c in dealt))
    # Each part divides by its own number of tokens, as without weights.
    part = counted.split(2)[0]
    found = collate(list(part), losses, 100, torch.clone, torch.device("cpu"))
    tokens = sum(len(r.loss_masks["term"].positions) for r in part)
    worth = sum(sum(r.loss_masks["term"].weights) for r in part)
    assert found.counts["term"].tokens == tokens
    assert weights_of(found, "term").sum() == pytest.approx(worth / tokens)


ALL_WEIGHTS = [
    PositionWeight(smallest=0.25, middle=0.3, width=0.1),
    TeacherEntropyWeight(rate=1.0),
    DriftWeight(strength=0.5),
    PassRateWeight(),
    PerplexityWeight(of="student"),
]


@pytest.mark.parametrize("weight", ALL_WEIGHTS, ids=lambda w: w.kind)
def test_nothing_to_count_weighs_nothing(batch, weight):
    term = distil(MaskSpec(student_entropy_top=0.5, skip_first=100), weight=weight)
    for rollouts in (tuple(batch), ()):
        found = count(RolloutBatch(rollouts=rollouts), term)
        assert found_weights(found) == []
        assert len(found) == len(rollouts)
    weights = weights_of(collated(batch, Table({"term": term, "other": imitate()})), "term")
    assert weights.tolist() == [0.0] * len(weights)
