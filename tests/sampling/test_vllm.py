"""Real vLLM in the trainer's process: it samples with the trained weights or reports that it does not.

vLLM keeps global state, so it runs in processes of its own: one for the scenario, two for complete runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from tinyruns import metrics, weights_of
from vllm_build import require_vllm

from sdkit.sampling import vllm_cpu

require_vllm()

SUPPORT = Path(__file__).resolve().parents[1] / "support"
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ | QUIET, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):
    """Results of the scenario, on a checkpoint whose generation settings would change the samples."""
    work = tmp_path_factory.mktemp("vllm")
    model = copytree(tiny_folder, work / "model")
    settings = {"repetition_penalty": 1.5, "min_p": 0.3, "min_new_tokens": 4, "top_k": 2}
    (model / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    out = run(SUPPORT / "vllm_scenario.py", model, work)
    return json.loads(out.splitlines()[-1])


def test_logprobs_agree_after_every_update(results):
    assert len(results["syncs"]) == 3
    for figures in [results["first load"], *results["syncs"], results["teacher"]]:
        assert figures["canary_mean"] < 1e-4
        assert figures["canary_max"] < 1e-3


def test_weights_take_the_reload_of_vllms_worker(results):
    assert len(results["reload has vLLM's configuration"]) > 5
    assert all(results["reload has vLLM's configuration"])


def test_norms_on_a_cpu_use_the_kernels_of_vllm(results):
    assert results["kernels"] == vllm_cpu.PRIORITY
    assert len(results["kernels' errors"]) == 4
    assert max(results["kernels' errors"].values()) < 4


def test_unchanged_weights_are_not_sent(results):
    assert results["unchanged weights"] == {}


def test_engine_that_slept_gets_the_same_weights_again(results):
    assert results["sleeping"] == [False, True, False]
    assert results["woken"]["canary_mean"] < 1e-4


def test_lost_transfer_is_detected(results):
    assert "differ from the trainer's" in results["stale"]
    assert results["repaired"]["canary_mean"] < 1e-4


def test_sampled_logprobs_match_the_trainer_at_the_temperature(results):
    assert results["sampled logprobs"] < 1e-3
    assert results["top_k logprobs"] < 1e-3
    assert results["at temperature 1"] > 0.1  # so they include the temperature
    assert results["greedy is the arg max"]


def test_ids_from_the_limit_on_are_not_sampled(results):
    assert 150 < results["largest id"] < 200
    assert results["limited logprobs"] < 1e-3


def test_tokens_depend_only_on_prompt_and_seed(results):
    assert results["same seeds, same tokens"]
    assert results["another batch, same tokens"]
    assert results["other seeds, other tokens"]


def test_stop_texts_cut_as_without_vllm(results):
    assert results["stop texts"]["same"]
    assert 0 < results["stop texts"]["stopped"] < results["stop texts"]["of"]


def test_trajectories_at_their_own_pace_are_those_of_lockstep(results):
    assert results["same at their own pace"]
    assert results["their logprobs"] < 1e-4
    assert "length" in results["endings"]
    assert results["turns"] > results["trajectories"]
    assert results["shorter turns after longer ones"] > 0


def test_sampling_leaves_the_trainers_generators_unchanged(results):
    assert results["generators untouched"]


def test_adapters_are_sent_as_a_merged_copy(results):
    assert all(mean < 1e-4 for mean in results["merged"])
    assert results["adapters untouched"]


def test_adapters_over_4_bits_are_sent_as_a_merged_copy(results):
    """vLLM samples from the quantized student, its teacher and the quantized start model."""
    assert all(mean < 1e-4 for mean in results["quantized"])
    assert results["quantized logprobs"] < 1e-3


@pytest.mark.full
def test_two_runs_from_the_command_line_are_equal(tiny_folder, tmp_path):
    columns = {"prompt": "q", "demonstration": "d"}
    rows = [{"q": f"What is {i} + 1?", "d": str(i + 1)} for i in range(8)]
    spec = {
        "model": {"path": str(tiny_folder), "dtype": "float32", "lora": {"r": 4, "lora_alpha": 8}},
        "data": {"source": {"kind": "inline", "rows": rows[:6]}, "columns": columns},
        "rollout": {"max_new_tokens": 8, "backend": {"kind": "vllm", "kv_cache_gib": 0.1}},
        "teacher": {
            "weights": {"kind": "ema", "update_rate": 0.3},
            "sees": {
                "template": "{prompt} ({demonstration})",
                "slots": {"demonstration": {"kind": "column", "name": "demonstration"}},
            },
        },
        "losses": {"distil": {"kind": "distillation", "divergence": "forward_kl", "support": "vocabulary"}},
        "rewards": {"digit": {"kind": "regex", "pattern": r"\d"}},
        "evaluation": {
            "suites": {"held_out": {"data": {"source": {"kind": "inline", "rows": rows[6:]}}, "score": "digit"}}
        },
        "optimizer": {"lr": 0.01},
        "training": {"steps": 2, "prompts_per_step": 3},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    runs = [tmp_path / name for name in ("one", "two")]
    for folder in runs:
        run("-m", "sdkit", "train", path, "--to", folder)
    one, two = map(metrics, runs)
    assert [line["step"] for line in one] == [0, 0, 1, 2, 2]
    assert one[2]["rollout/canary_mean"] < 1e-4
    assert one == two
    first, second = map(weights_of, runs)
    assert all(value.equal(second[name]) for name, value in first.items())
