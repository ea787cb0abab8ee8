"""The twelve rules about which answers exclude each other: each is refused, impossible to write, or always true."""

import pytest
from golden import TESTS
from one_rank import all_gather

from sdkit.batches import Rollout, RolloutBatch, Row
from sdkit.language.introspection import members
from sdkit.language.load import load_spec
from sdkit.language.specs import TeacherWeights
from sdkit.plan.plan import Machine, make_plan
from sdkit.plan.text import render_plan
from sdkit.train.loss_masks import build_loss_masks

REFUSED = {
    "1. a policy gradient on another's samples": "off_policy_gradient",
    "1. … on a teacher's without its log-probabilities": "off_policy_gradient-teacher",
    "2. one sampled token estimates the reverse KL alone": "sampled_token_divergence",
    "3. a live teacher with the student's view": "zero_signal",
    "4. a tail bucket of a sampled token": "unknown_key-sampled",
    "5. a mixture's share at its ends": "range-jsd",
    "8. a reward compared with itself": "lone_advantage",
    "11. another vocabulary": "teacher_vocabulary",
    "12. every token skipped": "empty_rows",
}
"""Rule → its bad example in tests/err; the code is the name up to the hyphen."""


@pytest.mark.parametrize("rule", REFUSED)
def test_rule_refuses_its_bad_example(rule):
    path = TESTS / "err" / f"{REFUSED[rule]}.yaml"
    checked = load_spec(path)
    code = REFUSED[rule].split("-")[0]
    assert [p.code for p in checked.problems if p.severity == "error"] == [code]
    assert checked.problems[0].place is not None


def test_5_forward_and_reverse_kl_are_kinds_of_their_own():
    from sdkit.language.introspection import keys_of
    from sdkit.language.specs import ForwardKl, Jsd, ReverseKl

    assert keys_of(ForwardKl) == {}
    assert set(keys_of(ReverseKl)) == {"detach_weights"}
    share = keys_of(Jsd)["teacher_share"].range
    assert share is not None
    assert not any(map(share.accepts, (0, 1)))


@pytest.mark.parametrize("example", ["served_support", "served_support-student"])
def test_6_and_9_served_teacher_returns_only_its_own_top_k(example):
    """A server cannot return scores on a support it did not choose, or logits to blend."""
    if "served" not in {weights.kind for weights in members(TeacherWeights)}:
        pytest.skip("no teacher is served")
    checked = load_spec(TESTS / "err" / f"{example}.yaml")
    assert {p.code for p in checked.problems} == {"served_support"}


def test_7_rollout_without_context_counts_no_token():
    """The metric rollout/with_teacher is the share of rollouts with a teacher prompt (tests/cli/test_bad_input.py)."""
    checked = load_spec(TESTS / "ok" / "sampled_token_divergence.yaml")
    assert checked.spec is not None
    row = Row(index=0, messages=({"role": "user", "content": "x"},), columns={}, raw={})
    with_and_without = tuple(
        Rollout(
            row=row,
            group=0,
            prompt_ids=(1,),
            teacher_prompt_ids=teacher,
            completion_ids=(5, 6),
            sampler_logprobs=None,
            policy_version=0,
            finished=True,
        )
        for teacher in ((2, 1), None)
    )
    masked = build_loss_masks(RolloutBatch(rollouts=with_and_without), checked.spec.losses, all_gather=all_gather)
    positions = [r.loss_masks["distil"].positions for r in masked if r.loss_masks]
    assert positions == [(0, 1), ()]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("frozen", "the student with its adapter off"),
        ("{kind: ema, update_rate: 0.05}", "a second adapter, float32 shadow"),
    ],
)
def test_10_plan_names_the_adapters_of_a_teacher(tmp_path, weights, expected):
    """The start model is the student with its adapter off; an EMA teacher averages the adapter's factors."""
    page = (TESTS / "ok" / "sampled_token_divergence.yaml").read_text(encoding="utf-8")
    page = page.replace("weights: frozen", f"weights: {weights}")
    run = (
        "model: {path: 'bundled:smollm2-135m-instruct', lora: {r: 4, lora_alpha: 8}}\n"
        "data: {source: {kind: inline, rows: [{q: a, d: b}]}, columns: {prompt: q, demonstration: d}}\n"
        "optimizer: {lr: 1.0e-4}\n"
        "training: {steps: 2, prompts_per_step: 1}\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(page + run, encoding="utf-8")
    checked = load_spec(path)
    assert checked.ok
    plan = make_plan(checked.spec, Machine(ranks=1, memory_gib=24.0, vllm=None), None)
    assert expected in render_plan(checked.spec, plan)


def test_every_rule_number_appears_here():
    import re
    from pathlib import Path

    numbers = {int(n) for rule in REFUSED for n in re.findall(r"^\d+", rule)}
    text = Path(__file__).read_text(encoding="utf-8")
    for name in re.findall(r"^def test_((?:\d+_(?:and_)?)+)", text, re.M):
        numbers |= {int(n) for n in re.findall(r"\d+", name)}
    assert numbers == set(range(1, 13))
