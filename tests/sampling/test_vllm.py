"""Real vLLM in the trainer's process: it samples under the weights that were trained, or says so.

vLLM keeps global state, so it runs in processes of its own: one for the scenario, two for whole runs.
"""

import json
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from tinyruns import metrics, weights_of
from warm import VLLM

pytest.importorskip("vllm")

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def run(warm, *command):
    done = warm.run(*command, imports=VLLM)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(warm, tiny_folder, tmp_path_factory):
    """What the scenario measured, of a checkpoint whose own settings would change what is sampled."""
    work = tmp_path_factory.mktemp("vllm")
    model = copytree(tiny_folder, work / "model")
    own = {"repetition_penalty": 1.5, "min_p": 0.3, "min_new_tokens": 4, "top_k": 2}
    (model / "generation_config.json").write_text(json.dumps(own | {"do_sample": True}))
    out = run(warm, SUPPORT / "vllm_scenario.py", model, work)
    return json.loads(out.splitlines()[-1])


def test_both_sides_agree_after_every_update(found):
    assert len(found["syncs"]) == 3
    for figures in [found["first load"], *found["syncs"], found["teacher"]]:
        assert figures["canary_mean"] < 1e-4
        assert figures["canary_max"] < 1e-3


def test_weights_that_did_not_change_are_not_sent(found):
    assert found["unchanged weights"] == {}


def test_a_lost_transfer_is_caught(found):
    assert "differ from the trainer's" in found["stale"]
    assert found["mended"]["canary_mean"] < 1e-4


def test_sampled_logprobs_are_the_trainers_under_the_temperature(found):
    assert found["sampled logprobs"] < 1e-3
    assert found["top_k logprobs"] < 1e-3
    assert found["at temperature 1"] > 0.1  # so the temperature is in them
    assert found["greedy is the arg max"]


def test_tokens_depend_on_prompt_and_seed_alone(found):
    assert found["same seeds, same tokens"]
    assert found["another batch, same tokens"]
    assert found["other seeds, other tokens"]


def test_stop_texts_cut_as_without_vllm(found):
    assert found["stop texts"]["same"]
    assert 0 < found["stop texts"]["stopped"] < found["stop texts"]["of"]


def test_the_trainers_generators_are_left_alone(found):
    assert found["generators untouched"]


def test_adapters_travel_as_a_merged_copy(found):
    assert all(mean < 1e-4 for mean in found["merged"])
    assert found["adapters untouched"]


def test_two_runs_from_the_command_line_are_the_same(warm, tiny_folder, tmp_path):
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
        run(warm, "-m", "sdkit", "train", path, "--to", folder)
    one, two = map(metrics, runs)
    assert [line["step"] for line in one] == [0, 0, 1, 2, 2]
    assert one[2]["rollout/canary_mean"] < 1e-4
    assert one == two
    first, second = map(weights_of, runs)
    assert all(value.equal(second[name]) for name, value in first.items())
