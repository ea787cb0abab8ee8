"""Two ranks against one plain process: gradients, losses, teachers and samples are the same under every ZeRO stage.

One rank, or one update, would hide a stale teacher; so two ranks (one pair of processes, ranks_scenario.py) make three
updates, and this process makes the same ones alone, under stage 0.
"""

import json
from pathlib import Path

import pytest
import ranks_scenario as scenario
import torch
from tinyruns import LORA, run_scenario
from warm import VLLM


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    from sdkit.models import tiny

    return tiny.build(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def found(warm, tiny_folder, other_folder, tmp_path_factory):
    """What two ranks measured."""
    work = run_scenario(warm, scenario.__file__, tiny_folder, tmp_path_factory.mktemp("ranks"), [other_folder])
    return torch.load(work / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(tiny_folder, other_folder, _leave_at_the_end, tmp_path_factory):
    """The same run in this process alone, under stage 0, with everything in one micro-batch; each kind once."""
    work = tmp_path_factory.mktemp("alone")
    kept = {}

    def run(name, stage=0, budget=scenario.ONE):
        if (name, stage, budget) not in kept:
            from sdkit.distributed import zero

            zero.start()
            spec = scenario.small(tiny_folder, stage=stage, budget=budget, **scenario.kinds(other_folder)[name])
            kept[name, stage, budget] = scenario.trained(spec, work)
        return kept[name, stage, budget]

    return run


def assert_same_training(found, expected):
    for name in ("loss", "grad_norm", "distance"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), atol=1e-5, rtol=1e-5)
    for kind in ("masters", "shadow"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(found[kind][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", scenario.ON_TWO_RANKS, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_two_ranks_train_as_one(found, alone, case):
    expected = alone(case[0])
    assert len(set(expected["loss"])) == 3
    assert_same_training(found["trained"][case], expected)


@pytest.mark.parametrize(("stage", "budget"), [(0, 100), (0, 200), (1, 100), (2, 100), (3, 100)])
def test_accumulation_and_stage_change_nothing_on_one_rank(alone, stage, budget):
    assert_same_training(alone("average", stage, budget), alone("average"))


def test_a_teacher_that_did_not_follow_would_be_seen(alone):
    """The tolerances above are far below what the teacher's moves change."""
    moving, still = alone("average")["loss"], alone("frozen")["loss"]
    assert moving[0] == still[0]
    assert min(abs(a - b) for a, b in zip(moving[1:], still[1:], strict=True)) > 1e-3


def test_offloading_changes_nothing(found, alone):
    assert_same_training(found["offloaded"], alone("average"))


def test_the_average_is_of_float32_masters_in_bfloat16(found):
    kept = found["bfloat16"]
    for name, shadow in kept["shadow"].items():
        assert shadow.dtype == kept["masters"][name].dtype == torch.float32
    assert any((s != s.bfloat16().float()).any() for s in kept["shadow"].values())
    assert all(distance > 0 for distance in kept["distance"])


def test_a_bad_gradient_of_one_rank_skips_the_step_on_all(found):
    for kept in found["skipped"].values():
        assert kept == {"applied": [False, True], "unchanged": True}


# ── samples ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sampled_alone(tiny_folder, _leave_at_the_end, tmp_path_factory):
    from sdkit.distributed import zero

    zero.start()
    return scenario.sampled(tiny_folder, tmp_path_factory.mktemp("sampled"), 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_sample_what_one_samples(found, sampled_alone, stage):
    kept = found["sampled"][stage]
    assert len(kept["rollouts"]) == 8
    assert strip(kept["rollouts"]) == strip(sampled_alone["rollouts"])
    for a, b in zip(kept["rollouts"], sampled_alone["rollouts"], strict=True):
        assert a["sampler_logprobs"] == pytest.approx(b["sampler_logprobs"], abs=1e-4)
    assert kept["records"] == sampled_alone["records"]
    assert kept["scores"] == sampled_alone["scores"]
    assert kept["lift"] == sampled_alone["lift"]
    assert kept["held out"] == pytest.approx(sampled_alone["held out"], rel=1e-4, abs=1e-5)


def strip(records):
    return [{k: v for k, v in record.items() if k != "sampler_logprobs"} for record in records]


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_may_end_at_other_lengths_and_have_other_numbers_of_prompts(found, sampled_alone, stage):
    (whole, *_) = sampled_alone["unequal"][0]
    first, second = found["sampled"][stage]["unequal"]
    assert first == [whole[:2]] * 5
    assert second == [whole[:9]]


# ── weights out, and written down ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "lora"), [("full", None), ("lora", LORA)])
def test_weights_are_streamed_a_block_at_a_time(found, tiny_folder, name, lora):
    from transformers import LlamaForCausalLM

    kept = found["streamed"][name]
    assert kept["left whole"] == 0
    start = dict(LlamaForCausalLM.from_pretrained(tiny_folder).named_parameters())
    for who in ("student", "teacher"):
        assert kept[who].keys() == start.keys()
        assert all(kept[who][n].shape == p.shape for n, p in start.items())
        assert 0 < kept[f"{who} whole"] < 0.5
    moved = {n for n, p in start.items() if not torch.equal(kept["student"][n], p.detach())}
    assert len(moved) >= 14
    if lora is None:
        masters = found["streamed"]["full"]["student"]
        assert moved == masters.keys()


@pytest.mark.parametrize("case", [(2, False), (3, False), (3, True)])
def test_what_was_written_down_goes_on_the_same(found, case):
    kept = found["resumed"][case]
    for kind in ("masters", "shadow"):
        for name, value in kept["straight"][kind].items():
            torch.testing.assert_close(kept["again"][kind][name], value, atol=0, rtol=0)


def test_vllm_takes_adapters_out_of_pieces(warm, tiny_folder, tmp_path):
    """An engine beside each of two ranks: both sides agree after every update, and no model is ever whole."""
    pytest.importorskip("vllm")
    script = Path(scenario.__file__).with_name("vllm_ranks_scenario.py")
    work = tmp_path / "work"
    work.mkdir()
    done = warm.run(script, tiny_folder, work, imports=VLLM)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((work / "found.json").read_text())
    assert found["ranks"] == 2
    assert found["rollouts"] == 4
    for syncs in found["syncs"]:
        assert len(syncs) == 5
        assert max(syncs) < 1e-4
    assert 0 < found["most"] < 0.5
    assert found["left whole"] == 0
