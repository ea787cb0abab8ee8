"""Smoke runs: good methods pass with any thresholds and bounds; a teacher that equals the student is refused."""

import pytest
import yaml

from sdkit.language.errors import NumericsGuard
from sdkit.language.load import load_spec
from sdkit.train import scripted_rewards
from sdkit.train.divergence import DivergenceWatch
from sdkit.train.gradient_signal import NOISE_RATIO, GradientNorms, is_noise
from sdkit.train.smoke import smoke

DISTIL = {"kind": "distillation", "divergence": "forward_kl", "support": "vocabulary"}
SUCCESS = "reward_at_least"


def teacher_with(template="{prompt} {d}", **slots):
    slots = slots or {"d": {"kind": "column", "name": "demonstration"}}
    return {"weights": "frozen", "sees": {"template": template, "slots": slots}}


def load_page(tmp_path, losses=None, **parts):
    """Writes and loads a method page."""
    parts = {"losses": losses or {"distil": DISTIL}} | parts
    path = tmp_path / "page.yaml"
    path.write_text(yaml.safe_dump(parts))
    return load_spec(path)


def rollout_with(count=4, **parts):
    return {"completions_per_prompt": count, **parts}


def keep_at_least(*thresholds):
    return [{"kind": SUCCESS, "threshold": threshold} for threshold in thresholds]


def policy_gradient(advantage, **parts):
    return {"pull": {"kind": "policy_gradient", "advantage": advantage, **parts}}


def routed_parts(threshold):
    route = {"when": "failed", "threshold": threshold, "then": ["distil"]}
    return {"teacher": teacher_with(), "route": route}


def sibling(threshold):
    return {"kind": "successful_sibling", "threshold": threshold}


FEEDBACK = teacher_with("{prompt} {f}", f="feedback")
BASELINE_NONE = {"kind": "group_relative", "baseline": "none", "overlong": {"stretch": 200}}
FROM_ZERO = {"from": 0, "to": 1, "steps": 100}
TO_ZERO = {"from": 1, "to": 0, "steps": 1}
EXTERNAL = {"kind": "external", "path": "./name-it-in-the-run-file"}
GOOD = {
    "demonstrated turns above keep": {
        "rollout": rollout_with(
            2, keep=keep_at_least(0.5), sampled_by={"kind": "student", "starts_with": {"turns_left": FROM_ZERO}}
        ),
        "teacher": teacher_with(),
    },
    **{f"route at {at:g}": {"rollout": rollout_with(), **routed_parts(at)} for at in (-2.5, 0.0, 0.5, 1, 7.5)},
    "route above keep": {"rollout": rollout_with(2, keep=keep_at_least(0.2)), **routed_parts(0.7)},
    "route above two keeps": {"rollout": rollout_with(1, keep=keep_at_least(-1, 3)), **routed_parts(3.5)},
    "one rollout a prompt": {"rollout": rollout_with(1, keep=keep_at_least(2.0)), "teacher": teacher_with()},
    "siblings of successes": {
        "rollout": rollout_with(2, keep=keep_at_least(1)),
        "teacher": teacher_with("{prompt} {s}", s=sibling(1.0)),
    },
    "siblings above the filter": {
        "rollout": rollout_with(2, keep=keep_at_least(0.0)),
        "teacher": teacher_with(
            "{prompt} {s} {v}",
            s=sibling(4.0),
            v={"kind": "verdict", "threshold": 2.0, "success": "good", "failure": "bad"},
        ),
    },
    "groups that differ, of successes": {
        "rollout": rollout_with(2, keep=[*keep_at_least(1), "non_constant_group"]),
        "losses": policy_gradient("group_relative"),
    },
    "pass rate": {
        "rollout": rollout_with(2, keep=keep_at_least(0)),
        "losses": policy_gradient("group_relative", weight={"kind": "pass_rate", "threshold": 3}),
    },
    "feedback of successes": {"rollout": rollout_with(keep=keep_at_least(1)), "teacher": FEEDBACK},
    "a column named system": {"teacher": teacher_with("{prompt} {d}", d={"kind": "column", "name": "system"})},
    "a small bound of a token": {
        "teacher": {"weights": EXTERNAL},
        "losses": {"distil": DISTIL | {"clip": {"token": 1e-4}}},
    },
    "a small bound of a log-ratio": {
        "teacher": {"weights": EXTERNAL},
        "losses": {"distil": DISTIL | {"clip": {"log_ratio": [-1e-4, 1e-4]}}},
    },
    "successes without a baseline": {
        "rollout": rollout_with(keep=keep_at_least(1)),
        "losses": policy_gradient(BASELINE_NONE),
    },
    "a coefficient from 0": {"teacher": teacher_with(), "losses": {"distil": DISTIL | {"coefficient": FROM_ZERO}}},
    "a coefficient to 0": {"teacher": teacher_with(), "losses": {"distil": DISTIL | {"coefficient": TO_ZERO}}},
    "a small coefficient": {"teacher": teacher_with(), "losses": {"distil": DISTIL | {"coefficient": 1e-6}}},
    "a trust region that opens": {
        "teacher": {"weights": EXTERNAL, "blend": {"kind": "trust_region", "student_share": TO_ZERO}}
    },
}


@pytest.mark.parametrize("parts", GOOD.values(), ids=GOOD)
def test_good_method_passes(tmp_path, parts):
    from tinyruns import silent_console

    checked = load_page(tmp_path, **parts)
    assert checked.ok, checked.problems
    steps = [line for line in smoke(checked.spec, silent_console(), home=tmp_path) if "grad_norm" in line]
    assert len(steps) == 2
    assert DivergenceWatch(5, steps).verdict() is None


EQUALS_STUDENT = {
    "frozen": {"weights": "frozen"},
    "average": {"weights": {"kind": "ema", "update_rate": 0.5}},
    "blend": {"weights": "student", "blend": {"kind": "geometric", "teacher_share": 0.3}},
    "trust region": {"weights": "frozen", "blend": {"kind": "trust_region", "student_share": 0.3}},
    "prompt alone": {"weights": "frozen", "sees": {"template": "{prompt}"}},
}


@pytest.mark.parametrize("teacher", EQUALS_STUDENT.values(), ids=EQUALS_STUDENT)
@pytest.mark.parametrize("losses", [{"distil": DISTIL}, policy_gradient("log_ratio")], ids=["kl", "ratio"])
def test_teacher_that_equals_the_student_is_refused(tmp_path, teacher, losses):
    """The rules refuse it, and so does the smoke run: its gradient is rounding noise."""
    from tinyruns import silent_console

    checked = load_page(tmp_path, losses=losses, teacher=teacher)
    assert {p.code for p in checked.problems} <= {"same_at_start", "blend_with_itself"}
    assert not checked.ok
    with pytest.raises(NumericsGuard, match="gradient"):
        smoke(checked.spec, silent_console(), home=tmp_path)


def test_noise_is_relative_to_the_gradient_of_imitation():
    no_gradient = GradientNorms(own=0.0, imitation=4.0)
    assert is_noise([no_gradient, GradientNorms(own=4.0 * (NOISE_RATIO / 2) ** 2, imitation=4.0)])
    assert not is_noise([no_gradient, GradientNorms(own=4.0 * (NOISE_RATIO * 2) ** 2, imitation=4.0)])
    assert not is_noise([GradientNorms(own=1e-12, imitation=4e-12)])  # a small coefficient
    assert not is_noise([no_gradient])  # a norm of 0 is refused for another reason
    assert not is_noise([])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rewards_lie_on_both_sides_of_every_threshold(tmp_path, count):
    spec = load_page(
        tmp_path,
        rollout=rollout_with(count, keep=keep_at_least(-3, 0, 0.5)),
        teacher=teacher_with(),
        route={"when": "failed", "threshold": 12.0, "then": ["distil"]},
    ).spec
    thresholds = [-3, 0, 0.5, 12.0]
    assert scripted_rewards.thresholds(spec) == thresholds
    groups = scripted_rewards.group_rewards(spec)
    assert all(len(group) == count for group in groups)
    rewards = {reward for group in groups for reward in group}
    for low, high in zip([-1e9, *thresholds], [*thresholds, 1e9], strict=True):
        assert any(low <= reward < high for reward in rewards), (low, high)
    if count > 1:
        assert any(min(group) >= 12.0 and len(set(group)) > 1 for group in groups)
        assert all(max(group) >= 12.0 for group in groups)


def test_rewards_without_a_threshold_have_both_outcomes(tmp_path):
    spec = load_page(tmp_path, teacher=teacher_with()).spec
    assert scripted_rewards.group_rewards(spec) == [[0.0], [1.0], [2.0]]
