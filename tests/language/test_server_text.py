"""The text of `sdkit plan` for rollouts from servers, and how old these rollouts are."""

import pytest

from sdkit.language.specs import (
    CrossEntropy,
    DataSpec,
    ExperimentSpec,
    InlineSource,
    LoraSpec,
    ModelSpec,
    OptimizerSpec,
    RolloutSpec,
    ShapeSpec,
    Table,
    TrainingSpec,
    VllmServerBackend,
)
from sdkit.plan.accelerators import ACCELERATORS, Machine
from sdkit.plan.plan import make_plan
from sdkit.plan.text import render_plan

TWO = VllmServerBackend(urls=("http://127.0.0.1:8000", "http://127.0.0.1:8001"))
SHAPE = ShapeSpec(
    parameters=2**30, hidden_size=8, num_hidden_layers=1, vocab_size=16, max_position_embeddings=64, kv_width=8
)


def make_server_plan(backend=TWO, staleness=0, updates=1, lora=None, shape=SHAPE, accelerator=None):
    spec = ExperimentSpec(
        rollout=RolloutSpec(backend=backend, max_staleness=staleness, max_prompt_tokens=8),
        losses=Table({"imitate": CrossEntropy()}),
        model=ModelSpec(path="org/name", dtype="bfloat16", lora=lora),
        data=DataSpec(source=InlineSource(rows=(Table({"prompt": "one"}),))),
        optimizer=OptimizerSpec(lr=1),
        training=TrainingSpec(steps=1, prompts_per_step=2, updates_per_rollout=updates),
    )
    machine = Machine(ranks=1, memory_gib=80.0, vllm=None, accelerator=accelerator)
    return spec, make_plan(spec, machine, shape)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "each of 2 servers gets the student's weights by a file of 2.00 GiB before each rollout batch"),
        ({"backend": VllmServerBackend()}, "the server gets the student's weights"),
        ({"shape": None}, "weights by a file before each rollout batch, checked by a canary"),
        ({"staleness": 1}, "before each rollout batch, 1 batch ahead of training, checked"),
        ({"staleness": 2}, "before each rollout batch, 2 batches ahead of training, checked"),
        ({"lora": LoraSpec(r=2, lora_alpha=2)}, "2.00 GiB (adapters merged into a copy) before"),
    ],
)
def test_plan_says_how_weights_reach_the_servers(changes, text):
    spec, plan = make_server_plan(**changes)
    assert text in plan.weight_sync
    assert plan.weight_sync in render_plan(spec, plan)
    assert "backend: vllm_server (the spec says so)" in render_plan(spec, plan)


@pytest.mark.parametrize(("staleness", "updates", "oldest"), [(0, 1, 0), (1, 1, 1), (2, 1, 2), (0, 3, 2), (2, 3, 8)])
def test_oldest_rollout_counts_updates_between(staleness, updates, oldest):
    assert make_server_plan(staleness=staleness, updates=updates)[1].oldest_rollout == oldest


def test_servers_use_no_trainer_memory_and_have_no_time_estimate():
    _, plan = make_server_plan(accelerator=ACCELERATORS["h100"])
    assert not [share for share in plan.memory.shares if "vLLM" in share.label]
    assert plan.step_time.unknown_reason == "how fast the rollout servers sample is not known"
