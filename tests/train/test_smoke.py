"""Smoke runs: good methods pass whatever their thresholds and bounds are; what teaches nothing is refused."""

import pytest
import yaml

from sdkit.language.errors import NumericsGuard
from sdkit.language.load import load_spec
from sdkit.train import scripted_rewards
from sdkit.train.gradient_signal import NOISE_RATIO, GradientNorms, is_noise
from sdkit.train.smoke import smoke

DISTIL = {"kind": "distillation", "divergence": "forward_kl", "support": "vocabulary"}
SUCCESS = "reward_at_least"


def seeing(template="{prompt} {d}", **slots):
    slots = slots or {"d": {"kind": "column", "name": "demonstration"}}
    return {"weights": "frozen", "sees": {"template": template, "slots": slots}}


def page(tmp_path, losses=None, **parts):
    """A method page as it would be written."""
    parts = {"losses": losses or {"distil": DISTIL}} | parts
    path = tmp_path / "page.yaml"
    path.write_text(yaml.safe_dump(parts))
    return load_spec(path)


def rollout(count=4, **parts):
    return {"completions_per_prompt": count, **parts}


def kept(*thresholds):
    return [{"kind": SUCCESS, "threshold": threshold} for threshold in thresholds]


def gradient(advantage, **parts):
    return {"pull": {"kind": "policy_gradient", "advantage": advantage, **parts}}


def routed(threshold):
    route = {"when": "failed", "threshold": threshold, "then": ["distil"]}
    return {"teacher": seeing(), "route": route}


def sibling(threshold):
    return {"kind": "successful_sibling", "threshold": threshold}


FEEDBACK = seeing("{prompt} {f}", f="feedback")
BASELINE_NONE = {"kind": "group_relative", "baseline": "none", "overlong": {"stretch": 200}}
FROM_ZERO = {"from": 0, "to": 1, "steps": 100}
TO_ZERO = {"from": 1, "to": 0, "steps": 1}
EXTERNAL = {"kind": "external", "path": "./name-it-in-the-run-file"}
GOOD = {
    **{f"route at {at:g}": {"rollout": rollout(), **routed(at)} for at in (-2.5, 0.0, 0.5, 1, 7.5)},
    "route above keep": {"rollout": rollout(2, keep=kept(0.2)), **routed(0.7)},
    "route above two keeps": {"rollout": rollout(1, keep=kept(-1, 3)), **routed(3.5)},
    "one rollout a prompt": {"rollout": rollout(1, keep=kept(2.0)), "teacher": seeing()},
    "siblings of successes": {"rollout": rollout(2, keep=kept(1)), "teacher": seeing("{prompt} {s}", s=sibling(1.0))},
    "siblings above the filter": {
        "rollout": rollout(2, keep=kept(0.0)),
        "teacher": seeing(
            "{prompt} {s} {v}",
            s=sibling(4.0),
            v={"kind": "verdict", "threshold": 2.0, "success": "good", "failure": "bad"},
        ),
    },
    "groups that differ, of successes": {
        "rollout": rollout(2, keep=[*kept(1), "non_constant_group"]),
        "losses": gradient("group_relative"),
    },
    "pass rate": {
        "rollout": rollout(2, keep=kept(0)),
        "losses": gradient("group_relative", weight={"kind": "pass_rate", "threshold": 3}),
    },
    "feedback of successes": {"rollout": rollout(keep=kept(1)), "teacher": FEEDBACK},
    "a column named system": {"teacher": seeing("{prompt} {d}", d={"kind": "column", "name": "system"})},
    "a small bound of a token": {
        "teacher": {"weights": EXTERNAL},
        "losses": {"distil": DISTIL | {"clip": {"token": 1e-4}}},
    },
    "a small bound of a log-ratio": {
        "teacher": {"weights": EXTERNAL},
        "losses": {"distil": DISTIL | {"clip": {"log_ratio": [-1e-4, 1e-4]}}},
    },
    "successes without a baseline": {"rollout": rollout(keep=kept(1)), "losses": gradient(BASELINE_NONE)},
    "a coefficient from 0": {"teacher": seeing(), "losses": {"distil": DISTIL | {"coefficient": FROM_ZERO}}},
    "a coefficient to 0": {"teacher": seeing(), "losses": {"distil": DISTIL | {"coefficient": TO_ZERO}}},
    "a small coefficient": {"teacher": seeing(), "losses": {"distil": DISTIL | {"coefficient": 1e-6}}},
    "a trust region that opens": {
        "teacher": {"weights": EXTERNAL, "blend": {"kind": "trust_region", "student_share": TO_ZERO}}
    },
}


@pytest.mark.parametrize("parts", GOOD.values(), ids=GOOD)
def test_a_good_method_passes(tmp_path, parts):
    from tinyruns import silent

    checked = page(tmp_path, **parts)
    assert checked.ok, checked.problems
    steps = [line for line in smoke(checked.spec, silent(), home=tmp_path) if "grad_norm" in line]
    assert len(steps) == 2


SAME = {
    "frozen": {"weights": "frozen"},
    "average": {"weights": {"kind": "ema", "update_rate": 0.5}},
    "blend": {"weights": "student", "blend": {"kind": "geometric", "teacher_share": 0.3}},
    "trust region": {"weights": "frozen", "blend": {"kind": "trust_region", "student_share": 0.3}},
    "prompt alone": {"weights": "frozen", "sees": {"template": "{prompt}"}},
}


@pytest.mark.parametrize("teacher", SAME.values(), ids=SAME)
@pytest.mark.parametrize("losses", [{"distil": DISTIL}, gradient("log_ratio")], ids=["kl", "ratio"])
def test_a_teacher_that_is_the_student_is_refused(tmp_path, teacher, losses):
    """By the rules before it starts, and by the gradient if it were started: rounding noise is none."""
    from tinyruns import silent

    checked = page(tmp_path, losses=losses, teacher=teacher)
    assert {p.code for p in checked.problems} <= {"same_at_start", "blend_with_itself"}
    assert not checked.ok
    with pytest.raises(NumericsGuard, match="gradient"):
        smoke(checked.spec, silent(), home=tmp_path)


def test_noise_is_measured_against_the_tokens_own_size():
    silent = GradientNorms(own=0.0, imitation=4.0)
    assert is_noise([silent, GradientNorms(own=4.0 * (NOISE_RATIO / 2) ** 2, imitation=4.0)])
    assert not is_noise([silent, GradientNorms(own=4.0 * (NOISE_RATIO * 2) ** 2, imitation=4.0)])
    assert not is_noise([GradientNorms(own=1e-12, imitation=4e-12)])  # a small coefficient
    assert not is_noise([silent])  # its norm is 0, which is another refusal
    assert not is_noise([])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rewards_stand_on_both_sides_of_every_threshold(tmp_path, count):
    spec = page(
        tmp_path,
        rollout=rollout(count, keep=kept(-3, 0, 0.5)),
        teacher=seeing(),
        route={"when": "failed", "threshold": 12.0, "then": ["distil"]},
    ).spec
    known = [-3, 0, 0.5, 12.0]
    assert scripted_rewards.thresholds(spec) == known
    groups = scripted_rewards.group_rewards(spec)
    assert all(len(group) == count for group in groups)
    rewards = {reward for group in groups for reward in group}
    for low, high in zip([-1e9, *known], [*known, 1e9], strict=True):
        assert any(low <= reward < high for reward in rewards), (low, high)
    if count > 1:
        assert any(min(group) >= 12.0 and len(set(group)) > 1 for group in groups)
        assert all(max(group) >= 12.0 for group in groups)


def test_without_a_threshold_there_are_both_outcomes(tmp_path):
    spec = page(tmp_path, teacher=seeing()).spec
    assert scripted_rewards.group_rewards(spec) == [[0.0], [1.0], [2.0]]
