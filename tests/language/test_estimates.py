"""Memory and time estimates of a plan, checked by mental arithmetic."""

import json

import pytest
from attrs import evolve

from sdkit.language.specs import (
    CrossEntropy,
    DatasetSamples,
    DataSpec,
    Distillation,
    EmaWeights,
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    ForwardKl,
    GeometricBlend,
    InlineSource,
    LoraSpec,
    MaskSpec,
    ModelSpec,
    OptimizerSpec,
    ProductBlend,
    ReferenceKl,
    RolloutSpec,
    ShapeSpec,
    Table,
    TeacherSpec,
    TrainingSpec,
    TransformersBackend,
    TrustRegionBlend,
    UserTurn,
    VllmBackend,
    VocabularySupport,
)
from sdkit.plan.accelerators import ACCELERATORS, Machine
from sdkit.plan.activations import intermediate_size, micro_batch_tokens
from sdkit.plan.machine import shape_of
from sdkit.plan.plan import make_plan

GIGA = ShapeSpec(
    parameters=2**30,
    hidden_size=1,
    num_hidden_layers=1,
    vocab_size=1,
    max_position_embeddings=10_000,
    kv_width=1,
    intermediate_size=1,
)
"""One layer of width 1, so that attention, activations and cache are negligible."""
H100 = Machine(ranks=4, memory_gib=80.0, accelerator=ACCELERATORS["h100"])
SPEED = 989e12 * 0.4
READING = 3.35e12 * 0.6
PASS = 2 * 2**30  # operations of a forward pass for one token
UPDATED = 2 * 100 + 4 * 900  # tokens of a rank in a pass of the update: each group's prompt once
DISTIL = Distillation(divergence=ForwardKl(), support=VocabularySupport())


def run(losses=None, **changes):
    """A run with 16 rollouts on four ranks, prompts of 100 and completions of 900 tokens."""
    parts = {
        "model": ModelSpec(path="m"),
        "data": DataSpec(source=InlineSource(rows=(Table({"q": "a"}),))),
        "rollout": RolloutSpec(
            max_prompt_tokens=100,
            max_new_tokens=900,
            completions_per_prompt=2,
            backend=VllmBackend(gpu_memory_utilization=0.5),
        ),
        "losses": Table(losses or {"imitate": CrossEntropy()}),
        "optimizer": OptimizerSpec(lr=1e-5),
        "training": TrainingSpec(steps=10, prompts_per_step=8, zero_stage=2),
    }
    return ExperimentSpec(**(parts | changes))


def distilled(**changes):
    teacher = TeacherSpec(
        weights=EmaWeights(update_rate=0.1), sees=UserTurn(template="{prompt}", max_prompt_tokens=600)
    )
    return run({"distil": DISTIL}, teacher=teacher, **changes)


def memory(spec, machine=H100):
    return {share.label: share.gib for share in make_plan(spec, machine, GIGA).memory.shares}


def phases(spec, machine=H100):
    time = make_plan(spec, machine, GIGA).step_time
    assert time is not None
    assert time.unknown_reason is None
    return [phase.seconds for phase in time.phases]


@pytest.mark.parametrize(
    ("stage", "dtype", "moments", "gradients"),
    [(0, "float32", 8, 4), (1, "bfloat16", 3, 4 + 2), (2, "bfloat16", 3, 1), (3, "float32", 2, 1)],
)
def test_zero_stages_shard_masters_moments_and_gradients(stage, dtype, moments, gradients):
    training = TrainingSpec(steps=1, prompts_per_step=4, zero_stage=stage)
    shares = memory(run(model=ModelSpec(path="m", dtype=dtype), training=training))
    assert shares["student weights"] == (4 if dtype == "float32" else 2) / (4 if stage == 3 else 1)
    assert (shares["masters and moments"], shares["gradients"]) == (moments, gradients)


def test_one_rank_stores_everything():
    shares = memory(run(), Machine(ranks=1))
    assert (shares["masters and moments"], shares["gradients"]) == (12, 4)


def test_average_teacher_has_a_copy_and_a_sharded_shadow():
    assert memory(distilled())["teacher weights"] == 2 + 4 / 4


def test_vllm_memory_is_a_share_of_an_accelerator_or_the_requested_size():
    assert memory(run())["vLLM weights and cache"] == 40
    assert memory(run(), Machine(ranks=4, memory_gib=80.0))["vLLM weights and cache"] == 2 + 1


@pytest.mark.parametrize(("stage", "gib"), [(2, 2), (3, 0.5)])
def test_stage_3_shards_other_models_too(stage, gib):
    teacher = TeacherSpec(weights=ExternalWeights(path="org/other"))
    training = TrainingSpec(steps=1, prompts_per_step=4, zero_stage=stage)
    plan = make_plan(
        run({"distil": DISTIL}, teacher=teacher, training=training), H100, GIGA, None, {"org/other": GIGA}
    )
    assert plan.memory is not None
    assert {share.label: share.gib for share in plan.memory.shares}["model org/other"] == gib


@pytest.mark.parametrize(("ranks", "copies"), [(1, 0), (4, 1)])
def test_buckets_are_allocated_whole_and_copied_to_be_sorted(ranks, copies):
    """2^29 values of 2 bytes; a copy in float32 for the sum, and on several ranks one of 2 bytes that is sorted by rank."""
    training = TrainingSpec(steps=1, prompts_per_step=4, zero_stage=2, reduce_bucket_size=2**29)
    shares = memory(run(training=training), evolve(H100, ranks=ranks))
    assert shares["gradients being reduced"] == 1 + 2 + copies


def test_unstated_feed_forward_width_follows_from_the_parameters():
    """Two layers of width 4: 2 · 4 · (4 + 4) in attention, 3 · 4 · 10 in the feed-forward part; 4 · 8 in the embedding."""
    shape = ShapeSpec(
        parameters=2 * (64 + 120) + 32, hidden_size=4, num_hidden_layers=2, vocab_size=8, max_position_embeddings=9
    )
    assert intermediate_size(shape) == 10


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 4000),  # four rollouts of 1000 tokens on each rank
        ({"updates_per_rollout": 4}, 1000),
        ({"micro_batch_tokens": 2500}, 2500),
        ({"micro_batch_tokens": 10}, 1000),  # one rollout has to fit
    ],
)
def test_largest_micro_batch(changes, tokens):
    spec = run()
    assert micro_batch_tokens(evolve(spec, training=evolve(spec.training, **changes)), ranks=4) == tokens


def test_offloaded_states_are_in_cpu_memory():
    training = TrainingSpec(steps=1, prompts_per_step=4, zero_stage=2, offload=("optimizer",))
    estimate = make_plan(run(training=training), H100, GIGA).memory
    assert estimate is not None
    assert estimate.host_gib == 3 + 1
    assert estimate.peak_gib == sum(share.gib for share in estimate.shares) - 4


def test_savings_are_listed_where_memory_is_short():
    """Of a model of 2^30 parameters on four ranks, stage 3 divides the weights, LoRA drops masters, moments, gradients."""
    machine = evolve(H100, memory_gib=10.0)
    estimate = make_plan(run(), machine, GIGA).memory
    assert estimate is not None
    assert estimate.peak_gib > 10
    changes = dict(estimate.savings)
    assert {"training.zero_stage=3", "training.offload=[optimizer]", "model.lora={r: 64, lora_alpha: 128}"} <= {
        *changes
    }
    assert sorted(changes.values()) == list(changes.values())
    assert all(gib < estimate.peak_gib for gib in changes.values())
    enough = make_plan(run(), evolve(H100, memory_gib=200.0), GIGA).memory
    assert enough is not None
    assert not enough.savings


def test_plan_warns_of_an_engine_whose_weights_do_not_fit():
    backend = VllmBackend(gpu_memory_utilization=0.02)
    small = make_plan(run(rollout=evolve(run().rollout, backend=backend)), H100, GIGA)
    assert any(
        "gpu_memory_utilization 0.02 is 1.6 GiB, too little for vLLM's weights of 2.0 GiB" in n for n in small.derived
    )
    assert not any("gpu_memory_utilization" in note for note in make_plan(run(), H100, GIGA).derived)


@pytest.mark.parametrize(
    ("spec", "gib"),
    [
        (run(), 2 + 12),
        (distilled(), 2 + 12 + 4),
        (run(training=TrainingSpec(steps=1, prompts_per_step=4, zero_stage=3)), 12),
        (
            run(
                model=ModelSpec(path="m", dtype="float32"),
                training=TrainingSpec(steps=1, prompts_per_step=4, zero_stage=0),
            ),
            4 + 8,
        ),
    ],
)
def test_disk_of_a_checkpoint(spec, gib):
    disk = make_plan(spec, H100, GIGA).disk
    assert disk is not None
    assert disk.checkpoint == gib


def test_processes_are_described():
    plan = make_plan(run(), H100, GIGA)
    assert plan.processes == (
        "4 ranks train, each on its own GPU, started by `--processes 4` or `torchrun`; the first writes the run directory",
        "rollouts: each rank samples 4 completions a step with its own vLLM engine, in the same process",
    )


def test_step_time_is_sampling_scoring_and_updating():
    """4 rollouts of 2 prompts per rank.  Each of 900 decoding steps reads 2 GiB; the teacher scores 1500 tokens per rollout;
    the update is three passes, each over 2 prompts of 100 and 4 completions of 900."""
    rollout, teacher, update = phases(distilled())
    prompts = 2 * 100 * PASS / SPEED
    assert rollout == pytest.approx(900 * 2**31 / READING + prompts, rel=1e-3)
    assert teacher == pytest.approx(4 * 1500 * PASS / SPEED, rel=1e-3)
    assert update == pytest.approx(3 * UPDATED * PASS / SPEED, rel=1e-3)


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(teacher_entropy_above=0.5)])
@pytest.mark.parametrize(
    ("blend", "partner_tokens", "partner_tokens_in_statistics"),
    [
        (TrustRegionBlend(student_share=0.01), 1500, 1500),
        (ProductBlend(student_power=0.8), 1000, 1000),
        (GeometricBlend(teacher_share=0.5), 0, 1000),  # the update includes it as the reference's pass
        (ExtrapolateBlend(factor=1.25), 0, 1000),
    ],
)
def test_blend_adds_scored_tokens(mask, blend, partner_tokens, partner_tokens_in_statistics):
    """4 rollouts of 1500 tokens with the teacher's prompt and 1000 with the student's.  A statistics pass scores them again."""
    spec = distilled()
    with_blend = evolve(spec.teacher, blend=blend)
    spec = evolve(spec, teacher=with_blend, losses=Table({"distil": evolve(DISTIL, mask=mask)}))
    tokens = 1500 + partner_tokens + (1500 + partner_tokens_in_statistics) * (mask != MaskSpec())
    _, teacher, update = phases(spec)
    assert teacher == pytest.approx(4 * tokens * PASS / SPEED, rel=1e-3)
    assert update == pytest.approx((3 + (partner_tokens == 0)) * UPDATED * PASS / SPEED, rel=1e-3)


def test_more_rows_than_max_num_seqs_take_another_wave():
    one_wave = phases(run())[0]
    two_waves = run(rollout=evolve(run().rollout, backend=VllmBackend(gpu_memory_utilization=0.5, max_num_seqs=2)))
    assert phases(two_waves)[0] == pytest.approx(2 * one_wave, rel=0.02)


def test_long_sequences_add_attention_and_cache_reads():
    """Layers × width are such that attention costs as much as the weights, so a pass takes twice as long."""
    wide = evolve(GIGA, hidden_size=2**10, num_hidden_layers=2**10, kv_width=2**10)
    spec = run(rollout=evolve(run().rollout, max_prompt_tokens=124))
    spec = evolve(spec, training=evolve(spec.training, share_prompts=False))
    short = make_plan(spec, H100, GIGA).step_time
    long = make_plan(spec, H100, wide).step_time
    assert short is not None
    assert long is not None
    assert long.phases[1].seconds == pytest.approx(2 * short.phases[1].seconds, rel=1e-3)
    # Each step reads 4 rows × 4 MiB per token × 574 tokens, and 2 GiB of weights.
    added = 900 * 4 * 2**22 * 574 / READING
    increase = long.phases[0].seconds - short.phases[0].seconds
    assert increase == pytest.approx(added, rel=0.01)


def test_only_completion_tokens_have_logits():
    """With all parameters in the output projection, a pass costs nothing for the prompts."""
    head = evolve(GIGA, hidden_size=2**10, vocab_size=2**20, num_hidden_layers=1)
    time = make_plan(distilled(), H100, head).step_time
    assert time is not None
    _, teacher, update = (phase.seconds for phase in time.phases)
    assert teacher == pytest.approx(4 * 900 * PASS / SPEED, rel=0.01)
    assert update == pytest.approx(3 * 4 * 900 * PASS / SPEED, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3),
        ({"model": ModelSpec(path="m", activation_checkpointing=True)}, 4),
        ({"model": ModelSpec(path="m", lora=LoraSpec(r=1, lora_alpha=1))}, 2),
        ({"losses": {"imitate": CrossEntropy(), "near": ReferenceKl(estimator="vocabulary")}}, 4),
    ],
)
def test_update_time_in_forward_passes(changes, passes):
    assert phases(run(**changes))[-1] == pytest.approx(passes * UPDATED * PASS / SPEED, rel=1e-3)


def test_data_set_completions_take_no_sampling_time():
    spec = run(rollout=evolve(run().rollout, sampled_by=DatasetSamples()))
    assert phases(spec)[0] == 0


def test_no_step_time_without_an_accelerator():
    assert make_plan(run(), Machine(ranks=4), GIGA).step_time is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (run(model=ModelSpec(path="m", dtype="float32")), "model.dtype is float32"),
        (run(rollout=RolloutSpec(max_prompt_tokens=9, backend=TransformersBackend())), "vLLM's"),
        (run(rollout=RolloutSpec(backend=VllmBackend())), "rollout.max_prompt_tokens"),
    ],
)
def test_step_time_is_unknown_with_a_reason(spec, reason):
    time = make_plan(spec, H100, GIGA).step_time
    assert time is not None
    assert not time.phases
    assert reason in time.unknown_reason


def test_shape_from_a_config_uses_head_dim(tmp_path):
    """Qwen3-4B: 32 heads of 128 at a hidden size of 2560, 8 key-value heads; 4,022,468,096 parameters including its q and k norms."""
    config = {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "vocab_size": 151_936,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40_960,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    shape = shape_of(run(), tmp_path)
    assert shape is not None
    assert (shape.kv_width, shape.q_width, shape.intermediate_size) == (1024, 4096, 9728)
    assert shape.parameters == 4_022_468_096 - 36 * 2 * 128
