"""Two ranks against one plain process: gradients, losses, teachers and samples are the same under every ZeRO stage.

With one rank or one update a stale teacher would go unnoticed, so two ranks (one pair of processes, ranks_scenario.py) make
three updates, and this process makes the same ones alone, under stage 0.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_scenario as scenario
import torch
from os_processes import free_port
from tinyruns import LORA, run_scenario
from vllm_build import require_vllm

DEADLINE = 800
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def two_ranks(warm, tiny_folder, other_folder, tmp_path_factory):
    """The results of two ranks."""
    work = run_scenario(
        warm, scenario.__file__, tiny_folder, tmp_path_factory.mktemp("ranks"), [other_folder], timeout=DEADLINE
    )
    return torch.load(work / "results.pt", weights_only=False)


def run_ranks(count, command):
    """Runs one process per rank; all must exit with 0 within the deadline."""
    port = free_port()
    rendezvous = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(count):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", *map(str, command)],
                env=os.environ | rendezvous | rank_env,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in processes:
            _, errors = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def train_alone(tiny_folder, other_folder, _stop_process_group, tmp_path_factory):
    """Trains a case in this process alone, by default under stage 0 in one micro-batch; caches the results."""
    work = tmp_path_factory.mktemp("alone")
    cache = {}

    def train(name, stage=0, budget=scenario.ONE):
        if (name, stage, budget) not in cache:
            from sdkit.distributed import zero

            zero.start()
            spec = scenario.small(tiny_folder, stage=stage, budget=budget, **scenario.kinds(other_folder)[name])
            cache[name, stage, budget] = scenario.train_run(spec, work)
        return cache[name, stage, budget]

    return train


def assert_same_training(results, expected):
    for name in ("loss", "grad_norm", "distance"):
        torch.testing.assert_close(torch.tensor(results[name]), torch.tensor(expected[name]), atol=1e-5, rtol=1e-5)
    for kind in ("masters", "shadow"):
        assert results[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(results[kind][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", scenario.ON_TWO_RANKS, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_two_ranks_train_like_one(two_ranks, train_alone, case):
    expected = train_alone(case[0])
    assert len(set(expected["loss"])) == 3
    assert_same_training(two_ranks["trained"][case], expected)


@pytest.mark.parametrize(("stage", "budget"), [(0, 100), (0, 200), (1, 100), (2, 100), (3, 100)])
def test_accumulation_and_stage_change_nothing_on_one_rank(train_alone, stage, budget):
    assert_same_training(train_alone("average", stage, budget), train_alone("average"))


def test_frozen_teacher_gives_other_losses(train_alone):
    """The tolerances above are far below the effect of the teacher's updates."""
    moving, still = train_alone("average")["loss"], train_alone("frozen")["loss"]
    assert moving[0] == still[0]
    assert min(abs(a - b) for a, b in zip(moving[1:], still[1:], strict=True)) > 1e-3


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_activations_changes_nothing(two_ranks, train_alone, stage):
    results = two_ranks["checkpointed"][stage]
    assert results["runs"] == 2 * scenario.STEPS * 2  # blocks × steps × (forward and backward pass)
    assert_same_training(results, train_alone("average"))


def test_offloading_changes_nothing(two_ranks, train_alone):
    assert_same_training(two_ranks["offloaded"], train_alone("average"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_average_follows_float32_masters(two_ranks, stage):
    results = two_ranks["bfloat16"][stage]
    assert max(results["own_shadow"]) < 0.51 * sum(value.numel() for value in results["masters"].values())
    assert all(results["complete"])
    for name, shadow in results["shadow"].items():
        assert shadow.dtype == results["masters"][name].dtype == torch.float32
    assert any((s != s.bfloat16().float()).any() for s in results["shadow"].values())
    assert all(distance > 0 for distance in results["distance"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_keeps_its_part_of_the_average(two_ranks, stage):
    results = two_ranks["trained"]["average", stage, scenario.SEVERAL]
    total = sum(value.numel() for value in results["masters"].values())
    if stage == 0:
        assert results["own_shadow"] == [total, total]
    else:
        assert sum(results["own_shadow"]) == total
        assert max(results["own_shadow"]) < 0.51 * total
    assert all(results["complete"])


def test_bad_gradient_of_one_rank_skips_the_step_on_all(two_ranks):
    for result in two_ranks["skipped"].values():
        assert result == {"applied": [False, True], "unchanged": True}


@pytest.fixture(scope="module")
def sampled_by_one(tiny_folder, _stop_process_group, tmp_path_factory):
    from sdkit.distributed import zero

    zero.start()
    return scenario.sample_and_evaluate(tiny_folder, tmp_path_factory.mktemp("sampled"), 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_sample_the_same_as_one(two_ranks, sampled_by_one, stage):
    results = two_ranks["sampled"][stage]
    assert len(results["rollouts"]) == 8
    assert without_logprobs(results["rollouts"]) == without_logprobs(sampled_by_one["rollouts"])
    for a, b in zip(results["rollouts"], sampled_by_one["rollouts"], strict=True):
        assert a["sampler_logprobs"] == pytest.approx(b["sampler_logprobs"], abs=1e-4)
    of_two, of_one = (without_entropy(part["records"]) for part in (results, sampled_by_one))
    assert of_two[0] == of_one[0]
    assert of_two[1] == pytest.approx(of_one[1], abs=1e-4)
    assert results["scores"] == sampled_by_one["scores"]
    assert results["lift"] == sampled_by_one["lift"]
    assert results["held out"] == pytest.approx(sampled_by_one["held out"], rel=1e-4, abs=1e-5)


def without_entropy(records):
    """The records of an evaluation without the entropies of their completions, and these."""
    others = [{**r, "measures": {k: v for k, v in r["measures"].items() if k != "entropy"}} for r in records]
    return others, [r["measures"]["entropy"] for r in records if "entropy" in r["measures"]]


def without_logprobs(records):
    return [{k: v for k, v in record.items() if k != "sampler_logprobs"} for record in records]


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_may_sample_different_lengths_and_numbers_of_prompts(two_ranks, sampled_by_one, stage):
    (completion, *_) = sampled_by_one["unequal"][0]
    first, second = two_ranks["sampled"][stage]["unequal"]
    assert first == [completion[:2]] * 5
    assert second == [completion[:9]]


@pytest.mark.parametrize(("name", "lora"), [("full", None), ("lora", LORA)])
def test_weights_are_streamed_block_by_block(two_ranks, tiny_folder, name, lora):
    from transformers import LlamaForCausalLM

    results = two_ranks["streamed"][name]
    assert results["gathered at end"] == 0
    start = dict(LlamaForCausalLM.from_pretrained(tiny_folder).named_parameters())
    for role in ("student", "teacher"):
        assert results[role].keys() == start.keys()
        assert all(results[role][n].shape == p.shape for n, p in start.items())
        assert 0 < results[f"{role} gathered"] < 0.5
    moved = {n for n, p in start.items() if not torch.equal(results["student"][n], p.detach())}
    assert len(moved) >= 14
    if lora is None:
        masters = two_ranks["streamed"]["full"]["student"]
        assert moved == masters.keys()


def test_only_the_first_rank_reads_weights_and_no_rank_holds_a_model(two_ranks):
    """Stage 3: the first rank reads student and external teacher; the two teachers made of the student are never read."""
    first, second = two_ranks["sharded"]
    assert (first["models"], second["models"]) == (4, 4)
    assert (first["reads"], second["reads"]) == (2, 0)
    assert 0 < second["peak"] < 0.3  # the embedding


def test_small_parameters_are_gathered_together_and_change_nothing(two_ranks):
    """Of the tiny model, the norms and the adapters' factors of the square projections are small."""
    alone, together = two_ranks["gathers"].values()
    assert all(ours < 0.5 * theirs for ours, theirs in zip(together["gathers"], alone["gathers"], strict=True))
    for kind in ("masters", "shadow"):
        for name, value in alone["weights"][kind].items():
            assert torch.equal(together["weights"][kind][name], value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_summed_in_float32(two_ranks, stage):
    assert two_ranks["reduced"][stage, "float32"] < 1e-5
    assert two_ranks["reduced"][stage, "bfloat16"] > 5e-4


def test_every_rank_reports_weights_that_the_first_cannot_read(two_ranks):
    first, second = two_ranks["damaged"]
    assert first == second
    assert first.startswith("cannot load")


@pytest.mark.parametrize("case", scenario.RESUMED, ids=lambda case: f"{case[0]}-{case[2]}-{bool(case[1])}")
def test_loaded_checkpoint_continues_identically(two_ranks, case):
    results = two_ranks["resumed"][case]
    for kind in ("masters", "shadow"):
        for name, value in results["straight"][kind].items():
            torch.testing.assert_close(results["again"][kind][name], value, atol=0, rtol=0)


@pytest.fixture(scope="module")
def with_vllm(tiny_folder, tmp_path_factory):
    """Runs two ranks with an engine for each, or with one that both share; returns the results and caches them."""
    require_vllm()
    script = Path(scenario.__file__).with_name("vllm_ranks_scenario.py")

    @functools.cache
    def run(ranks_per_engine):
        work = tmp_path_factory.mktemp("engines")
        run_ranks(2, [script, tiny_folder, work, ranks_per_engine])
        return json.loads((work / "results.json").read_text())

    return run


@pytest.mark.full
def test_ranks_that_share_an_engine_sample_what_they_sample_alone(with_vllm):
    alone, shared = with_vllm(1), with_vllm(2)
    assert shared["tokens"] == alone["tokens"]
    assert shared["local ranks"] == [0, 1]
    assert max(max(syncs) for syncs in shared["syncs"]) < 1e-4


def test_vllm_gets_merged_adapters_from_shards(with_vllm):
    """One vLLM engine for each of two ranks: log-probabilities agree after every update; the model is never gathered."""
    results = with_vllm(1)
    assert results["ranks"] == 2
    assert results["local ranks"] == [0, 1]
    assert results["rollouts"] == 4
    for syncs in results["syncs"]:
        assert len(syncs) == 5
        assert max(syncs) < 1e-4
    assert 0 < results["peak"] < 0.5
    assert results["gathered at end"] == 0
