"""Advantages and the clipped surrogate, against golden values and plain loops."""

import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from sdkit.losses.divergence import forward_kl, reverse_kl
from sdkit.losses.policy import (
    clip_binds,
    clipped_surrogate,
    group_advantages,
    k1,
    k2,
    k3,
    own_gradient,
    policy_ratio,
    scaled_advantages,
    sequence_mean,
)

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
ONE_GROUP = torch.zeros(8, dtype=torch.long)
INF = math.inf


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "eps", "right", "wrong"), [("none", 1e-4, 0.75, -0.25), ("group_std", 1e-4, 1.619835, -0.539945)]
)
def test_golden_advantages(scale, eps, right, wrong):
    advantages = group_advantages(REWARDS, ONE_GROUP, "group_mean", scale, eps)
    expected = torch.where(REWARDS == 1, right, wrong)
    assert_close(advantages, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("baseline", ["group_mean", "none"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_advantages_match_loops(baseline, scale):
    rewards = [0.3, 2.0, -1.0, 0.3, 5.0, 0.1, 0.1, 0.1, 7.0, 1.5]
    group = [9, 4, 9, 4, 4, 2, 2, 2, 100, 9]  # not contiguous, not from 0; one group of one, one with equal rewards
    expected = []
    for r, g in zip(rewards, group, strict=True):
        own = [x for x, h in zip(rewards, group, strict=True) if h == g]
        equal = max(own) == min(own)
        value = r - statistics.mean(own) if baseline == "group_mean" else r
        if equal and (baseline == "group_mean" or scale == "group_std"):
            expected.append(0.0)
        elif scale == "none":
            expected.append(value)
        else:
            std = statistics.stdev(own if scale == "group_std" else rewards)
            expected.append(value / (std + 0.01))
    actual = group_advantages(doubles(*rewards), torch.tensor(group), baseline, scale, 0.01)
    assert_close(actual, doubles(*expected))


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 / 3, -2.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_have_zero_advantage_exactly(scale, value, size):
    """The mean of three times 0.1 is not exactly 0.1; divided by a tiny eps, the difference would show."""
    rewards, group = torch.full((size,), value), torch.zeros(size, dtype=torch.long)
    advantages = group_advantages(rewards, group, "group_mean", scale, 1e-12)
    assert torch.equal(advantages, torch.zeros(size))


def test_group_of_one_without_baseline_keeps_its_reward():
    rewards, group = torch.tensor([3.0, -1.0]), torch.tensor([0, 1])
    assert torch.equal(group_advantages(rewards, group, "none", "none", 1e-4), rewards)
    assert not group_advantages(rewards, group, "none", "group_std", 1e-4).any()
    scaled = group_advantages(rewards, group, "none", "batch_std", 0.0)
    assert_close(scaled, rewards / math.sqrt(8))


def test_batch_of_equal_rewards_has_no_scaled_advantage():
    assert not group_advantages(torch.ones(4), torch.arange(4), "none", "batch_std", 1e-4).any()


def test_nan_reward_stays_visible():
    rewards = torch.tensor([1.0, math.nan, 0.0])
    for scale in ("none", "group_std"):
        advantages = group_advantages(rewards, torch.tensor([0, 0, 1]), "group_mean", scale, 1e-4)
        assert advantages.isnan().tolist() == [True, True, False]


def test_golden_scaled_advantages():
    """RLSD (arXiv 2604.03128) at A = −1, share ½, clip 0.8 … 1.2."""
    scaled = scaled_advantages(doubles(-1, -1, -1), doubles(0.5, -0.5, 2), 0.5, 0.2, 0.2)
    assert_close(scaled, doubles(-0.9, -1.1, -0.9))
    unscaled = doubles(2.0, -3.0, 0.0)
    assert_close(scaled_advantages(unscaled, doubles(9, -9, 4), 0.0, 0.2, 0.2), unscaled)
    assert_close(scaled_advantages(unscaled, doubles(0, 0, 0), 1.0, 0.2, 0.2), unscaled)
    assert_close(scaled_advantages(unscaled, doubles(1, 1, 1), 1.0, 0.2, 0.2), doubles(2.4, -2.4, 0))


def test_no_rewards_give_no_advantages():
    none = torch.zeros(0, dtype=torch.long)
    for scale in ("none", "group_std", "batch_std"):
        assert group_advantages(torch.zeros(0), none, "group_mean", scale, 1e-4).shape == (0,)


def test_rollout_order_changes_nothing():
    rewards, group = torch.arange(6.0).square(), torch.tensor([0, 1, 0, 1, 0, 2])
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    for scale in ("none", "group_std", "batch_std"):
        advantages = group_advantages(rewards, group, "group_mean", scale, 1e-4)
        reordered = group_advantages(rewards[order], group[order], "group_mean", scale, 1e-4)
        assert_close(reordered, advantages[order])


def by_hand(ratio, advantage, low, high, dual):
    """−min(ρA, clip(ρ)A) with the dual clip, as the papers write it."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


CLIPS = [(0.2, 0.2, None), (0.2, 0.28, 3.0), (3e-4, 4e-4, None), (INF, INF, None), (INF, INF, 2.0)]


@pytest.mark.parametrize(("low", "high", "dual"), CLIPS)
def test_surrogate_and_gradient_by_hand(naive, low, high, dual):
    for advantage in (-1.5, 0.0, 0.7):
        for ratio in (0.01, 0.5, 0.79, 0.81, 0.9999, 1.0, 1.0003, 1.19, 1.29, 1.9, 2.5, 9.0):

            def value(x, advantage=advantage):
                return by_hand(math.exp(x[0]), advantage, low, high, dual)

            log_ratio = doubles(math.log(ratio)).requires_grad_()
            loss = clipped_surrogate(log_ratio, doubles(advantage), low, high, dual)
            (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
            assert loss.item() == pytest.approx(value(log_ratio.tolist()), abs=1e-12)
            assert grad.item() == pytest.approx(naive.slope(value, log_ratio.tolist())[0], abs=1e-7)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("edge", [0.5, 1.5])
def test_clip_does_not_bind_at_its_bounds(edge, advantage):
    """The clip binds one ulp outside its bound, not at the bound."""
    for ratio, inside in [
        (edge, True),
        (math.nextafter(edge, 1.0), True),
        (math.nextafter(edge, 9.0 if edge > 1 else 0.0), False),
    ]:
        below, above = clip_binds(doubles(ratio), doubles(advantage), 0.5, 0.5)
        assert below.item() == (not inside and edge < 1 and advantage < 0)
        assert above.item() == (not inside and edge > 1 and advantage > 0)


def test_clip_of_zero_binds_on_one_side_of_one():
    log_ratio = doubles(-1e-9, 0.0, 1e-9).requires_grad_()
    for advantage, slopes in [(1.0, [1, 1, 0]), (-1.0, [0, 1, 1])]:
        loss = clipped_surrogate(log_ratio, torch.full_like(log_ratio, advantage), 0.0, 0.0)
        (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert_close(grad, -advantage * doubles(*slopes))


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    log_ratio = doubles(2.0, 4.0, 5.0).log().requires_grad_()
    loss = clipped_surrogate(log_ratio, doubles(-1.0, -1.0, 1.0), 0.2, 0.2, 3.0)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert_close(loss, doubles(2.0, 3.0, -1.2))
    assert_close(grad, doubles(2.0, 0.0, 0.0))


def test_zero_advantage_has_no_gradient():
    log_ratio = doubles(-9.0, -0.1, 0.0, 0.5, 30.0).requires_grad_()
    for clip in CLIPS:
        loss = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), *clip)
        (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert not loss.any()
        assert not grad.any()


def test_surrogate_changes_no_argument_and_advantages_get_no_gradient():
    log_ratio, advantages = torch.randn(2, 5).unbind()
    log_ratio.requires_grad_()
    advantages.requires_grad_()
    clipped_surrogate(log_ratio, advantages, 0.2, 0.2, 3.0).sum().backward()
    assert advantages.grad is None
    assert (log_ratio._version, advantages._version) == (0, 0)


def test_ratios_stay_finite():
    log_ratio = torch.tensor([-INF, -1000.0, 1000.0, INF], requires_grad=True)
    ratio = policy_ratio(log_ratio)
    ratio.sum().backward()
    assert_close(ratio, torch.tensor([-20.0, -20, 20, 20]).exp())
    assert torch.equal(log_ratio.grad, torch.zeros(4))


def sequence_log_ratio(now, then, row, rows):
    return own_gradient(sequence_mean((now - then).detach(), row, rows), now)


def test_golden_sequence_ratio():
    old, new = torch.tensor([0.5, 0.4, 0.2]).log(), torch.tensor([0.55, 0.9, 0.7]).log()
    ratio = policy_ratio(sequence_log_ratio(new, old, torch.zeros(3, dtype=torch.long), 1))
    assert_close(ratio, torch.full((3,), 2.0537508), atol=1e-6, rtol=0)


@pytest.mark.parametrize("clip", [(INF, INF, None), (0.05, 0.05, None), (0.02, 0.3, 1.2)])
def test_sequence_ratio_gradient_matches_brute_force(naive, clip):
    """Token gradients, summed over a sequence, are the gradient of the sequence's ratio.

    Brute force: Σ_i w_i |y_i| L(s_i, A_i) with s_i = exp(mean_t(now − then)) differentiated through every token.
    """
    row = [0, 0, 0, 2, 3, 3]
    now = [-1.0, -2.0, -0.5, -1.2, -3.0, -0.1]
    then = [-1.3, -1.9, -0.6, -1.5, -2.9, -0.4]
    advantage, weight = [1.0, 9.0, -0.5, -2.0], [0.3, 9.0, 0.5, 0.25]

    def sequence_loss(now):
        loss = 0.0
        for i in range(4):
            own = [n - t for n, t, r in zip(now, then, row, strict=True) if r == i]
            if own:
                ratio = math.exp(sum(own) / len(own))
                loss += weight[i] * len(own) * by_hand(ratio, advantage[i], *clip)
        return loss

    rows, x = torch.tensor(row), doubles(*now).requires_grad_()
    log_ratio = sequence_log_ratio(x, doubles(*then), rows, 4)
    token_loss = clipped_surrogate(log_ratio, doubles(*advantage)[rows], *clip)
    loss = (doubles(*weight)[rows] * token_loss).sum()
    (grad,) = torch.autograd.grad(loss, x)
    # A token's gradient stands for its share of the sequence's, so the sums must agree …
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, rows, grad)
    slopes = doubles(*naive.slope(sequence_loss, now))
    assert loss.item() == pytest.approx(sequence_loss(now), abs=1e-12)
    assert_close(sums, torch.zeros_like(sums).index_add(0, rows, slopes), atol=1e-8, rtol=0)
    # … and here every token's must too, because the ratio is one number.
    assert_close(grad, slopes, atol=1e-8, rtol=0)


def test_own_gradient_keeps_the_value_and_the_tokens_gradient():
    now = doubles(-1.0, -2.0).requires_grad_()
    value = own_gradient(doubles(5.0, 7.0).requires_grad_(), now)
    assert torch.equal(value, doubles(5.0, 7.0))
    assert torch.equal(torch.autograd.grad(value.sum(), now)[0], doubles(1.0, 1.0))


def expected_gradient(token_loss, pair, drawn_from=None):
    """Σ_y p_y ∇ℓ(y) with p constant: the student's distribution unless `drawn_from` is given."""
    s, t = pair.student.log_softmax(-1), pair.teacher.log_softmax(-1)
    p = s.exp().detach() if drawn_from is None else drawn_from.exp()
    return torch.autograd.grad((p * token_loss(s, t)).sum(), pair.student)[0]


def exact_gradient(divergence, pair):
    value = divergence(pair.student.log_softmax(-1), pair.teacher.log_softmax(-1))
    return torch.autograd.grad(value, pair.student)[0]


def test_log_ratio_advantage_gives_the_reverse_kl_gradient(pair):
    def surrogate(s, t):
        return clipped_surrogate(s - s.detach(), (t - s).detach(), 0.2, 0.2)

    assert_close(expected_gradient(surrogate, pair), exact_gradient(reverse_kl, pair))


def test_only_k2_has_the_gradient_of_the_reference_kl(pair):
    expected = exact_gradient(reverse_kl, pair)
    assert_close(expected_gradient(k2, pair), expected)
    assert_close(expected_gradient(k1, pair), torch.zeros_like(expected), atol=1e-12, rtol=0)
    assert_close(expected_gradient(k3, pair), exact_gradient(forward_kl, pair))
    assert (exact_gradient(forward_kl, pair) - expected).abs().max() > 0.05


def test_importance_ratio_corrects_old_samples(pair):
    """E over old samples of ∇(−ρA) is −∇ Σ_y S_y A_y for any A."""
    old = doubles(0.5, -1, 0.3, 0.2, 1, 0).log_softmax(-1)
    advantages = doubles(1.0, -2.0, 0.5, 3.0, 0.0, -1.0)
    actual = expected_gradient(lambda s, _t: clipped_surrogate(s - old, advantages), pair, old)
    expected_advantage = (pair.student.softmax(-1) * advantages).sum()
    assert_close(actual, -torch.autograd.grad(expected_advantage, pair.student)[0])


def test_constant_baseline_changes_no_expected_gradient(pair):
    advantages = doubles(1.0, -2.0, 0.5, 3.0, 0.0, -1.0)
    plain, shifted = (
        expected_gradient(lambda s, _t, a=a: clipped_surrogate(s - s.detach(), a), pair)
        for a in (advantages, advantages - 7.0)
    )
    assert_close(plain, shifted)
