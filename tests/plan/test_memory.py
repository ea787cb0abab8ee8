"""The memory estimate of a plan against what real forward passes and training steps allocate."""

import pytest
import torch
from attrs import evolve
from memory_ledger import bytes_since, ledger, live_storages
from tinyruns import COLUMNS, distil, make_spec, model, rollout, rollouts_of, teacher, train_step, training
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdkit.batches import HiddenStateScores, Tokens
from sdkit.language.model_shapes import shape_at
from sdkit.language.specs import (
    CrossEntropy,
    DatasetSamples,
    DataSpec,
    DivergenceClip,
    EmaWeights,
    ForwardKl,
    GroupRelative,
    InlineSource,
    Jsd,
    LinearMix,
    LoraSpec,
    PolicyGradient,
    ReferenceKl,
    ReverseKl,
    SampledTokenSupport,
    SkewedReverseKl,
    Table,
    TopKSupport,
)
from sdkit.losses import chunks
from sdkit.losses.objective import Objective
from sdkit.models import packing
from sdkit.models.attention import cpu_sdpa
from sdkit.plan import activations, memory
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan
from sdkit.train.run import open_run
from sdkit.train.step import _collate

MARGIN = 0.15
BUCKET = 100_000
"""Gradients that are reduced at a time; by default more than the models here have."""
ON_CPU = Machine(ranks=1, on_cpu=True)


@pytest.fixture(scope="module")
def write_model(tiny_folder, tmp_path_factory):
    """Writes a random model of a family of shapes; returns its folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    folders = {}

    def write(family="Llama", **changes):
        sizes = {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
        } | changes
        key = (family, *sizes.items())
        if key not in folders:
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(
                vocab_size=512,
                num_attention_heads=4,
                head_dim=32,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sizes,
            )
            folders[key] = tmp_path_factory.mktemp(family) / "model"
            getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folders[key])
            tokenizer.save_pretrained(folders[key])
        return folders[key]

    return write


def saved_bytes(folder, dtype, attention, mask):
    """What autograd saves in a forward pass of two rows of 64 tokens, beside the parameters."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    own = {parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loaded.model(input_ids=torch.arange(128).view(2, 64), attention_mask=mask, use_cache=False)
    return sum(size for _, size in saved.values())


@pytest.mark.parametrize(
    ("family", "dtype", "attention", "packed", "sizes"),
    [
        ("Llama", "float32", "sdpa", False, {}),
        ("Llama", "bfloat16", "sdpa", True, {}),
        ("Llama", "bfloat16", "repeated", True, {}),  # as on a GPU
        ("Llama", "bfloat16", "eager", False, {}),
        ("Qwen2", "bfloat16", "sdpa", False, {"intermediate_size": 677}),  # Qwen2.5-7B's proportions
        ("Qwen3", "bfloat16", "sdpa", False, {"intermediate_size": 384}),  # Qwen3-8B's
    ],
)
def test_saved_bytes_of_a_layer(write_model, family, dtype, attention, packed, sizes):
    """The difference between models of three layers and of one, with the same number of rows."""
    on_cpu, attention = attention != "repeated", attention.replace("repeated", "sdpa")
    AttentionInterface.register("sdpa", cpu_sdpa if on_cpu else sdpa_attention_forward)
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool).tril() if packed else None
    folders = [write_model(family, num_hidden_layers=layers, **sizes) for layers in (1, 3)]
    one, three = (saved_bytes(folder, getattr(torch, dtype), attention, mask) for folder in folders)
    spec = make_spec("m", model=evolve(model("m", dtype=dtype), attn_implementation=attention))
    spec = evolve(spec, rollout=evolve(spec.rollout, completions_per_prompt=1 + packed))
    shape = shape_at(str(folders[0]), folders[0])
    expected = activations.layer_bytes(spec, shape, memory.BYTES[dtype], 64, on_cpu=on_cpu)
    assert (three - one) / 2 / 128 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "losses",
    [
        {"a": CrossEntropy()},
        {"a": PolicyGradient(advantage=GroupRelative())},
        {"a": ReferenceKl(estimator="k2")},
        {"a": ReferenceKl(estimator="vocabulary")},
        distil(),
        distil(divergence=ForwardKl(), clip=DivergenceClip(entry=0.05)),
        distil(divergence=ReverseKl()),
        distil(divergence=ReverseKl(), support=SampledTokenSupport()),
        distil(divergence=Jsd(teacher_share=0.5)),
        distil(divergence=LinearMix(forward_share=0.5)),
        distil(divergence=SkewedReverseKl(share=0.1)),
        distil(
            divergence=Jsd(teacher_share=0.5), support=TopKSupport(k=100, chosen_by="student", remainder="tail_bucket")
        ),
        {"a": PolicyGradient(advantage=GroupRelative()), "b": ReferenceKl(estimator="vocabulary")},
        {**distil(), "b": ReferenceKl(estimator="vocabulary")},
        {**distil(divergence=Jsd(teacher_share=0.5)), "b": CrossEntropy()},
    ],
    ids=lambda losses: "+".join(getattr(t, "divergence", t).kind for t in losses.values()),
)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_chunk_of_the_objective(losses, on_cpu, monkeypatch):
    """On an accelerator all rows of a chunk at once, on a CPU in blocks; here of eight rows."""
    width, vocabulary, rows = 8, 8192, 64
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 8 * 4 * vocabulary)
    monkeypatch.setattr(activations, "CPU_BLOCK_BYTES", 8 * 4 * vocabulary)
    if not on_cpu:
        monkeypatch.setattr(chunks, "_block_rows", len)
    spec = evolve(make_spec("m"), losses=Table(losses), training=training(chunk_tokens=rows))

    def scores():
        states = torch.randn(128, width, dtype=torch.bfloat16), torch.randn(vocabulary, width, dtype=torch.bfloat16)
        return HiddenStateScores(hidden=states[0], head=states[1])

    ones = torch.ones(128)
    tokens = Tokens(
        token=torch.zeros(128, dtype=torch.long),
        row=torch.zeros(128, dtype=torch.long),
        weights=dict.fromkeys(losses, ones),
        sampler_logprobs=None,
        old_logprobs=None,
        advantages=ones,
    )
    student = scores()
    hidden, head = student.hidden.requires_grad_(), student.head.requires_grad_()
    others = [
        scores() if needed else None
        for needed in (any(t.needs_teacher for t in losses.values()), spec.has_reference_term)
    ]
    with ledger() as book:
        objective = Objective(spec.losses, 1.0)
        chunks.projected_loss(hidden, head, others[0], tokens, objective, rows, others[1])
    shape = evolve(shape_at("bundled:smollm2-135m-instruct", None), vocab_size=vocabulary, hidden_size=width)
    expected = activations.chunk_bytes(spec, shape, 2, on_cpu=on_cpu)
    expected += activations.head_gradient_bytes(spec, shape, 2)[0]
    assert book.peak == pytest.approx(expected, rel=MARGIN)


def test_constants_are_those_of_the_engine():
    assert activations.LONGEST_PACK == packing.LONGEST_PACK
    assert activations.CPU_BLOCK_BYTES == chunks.BLOCK_BYTES


def step_run(folder, **changes):
    """A run on four completions of some 160 tokens, two in a micro-batch."""
    rows = [
        Table({"prompt": f"What is {n}?", "demonstration": f"{n} = {n}", "answer": ", ".join([str(n)] * 80)})
        for n in (5, 6, 7, 8)
    ]
    parts = {
        "data": DataSpec(source=InlineSource(rows=tuple(rows)), columns=COLUMNS, shuffle=False),
        "rollout": rollout(sampled_by=DatasetSamples(column="answer"), max_new_tokens=512),
    }
    return make_spec(folder, **(parts | changes))


def measure_step(spec, folder):
    """Returns bytes at the peak of the second training step and of a checkpoint, and the largest micro-batch in tokens."""
    before = live_storages()
    trainer = open_run(spec, folder)
    batch = rollouts_of(trainer)
    train_step(trainer, batch)
    resident = bytes_since(before)
    held = bytes_since(())
    with ledger() as book:
        train_step(trainer, batch)
    assert abs(bytes_since(()) - held) < 1000  # nothing older was freed, which the ledger would not see
    parts = _collate(trainer.learner, batch, trainer.specs.losses).micro_batches
    assert len(parts) > 1
    trainer.learner.zero.save(folder, "checkpoint")
    saved = sum(path.stat().st_size for path in (folder / "checkpoint").rglob("*") if path.is_file())
    saved += sum(average.nbytes for average in trainer.models.teacher.state().values())
    trainer.close()
    return resident + book.peak, saved, max(part.student.input_ids.numel() for part in parts)


EMA = teacher(EmaWeights(update_rate=0.1))
STEPS = {
    "float32, stage 0": ({}, {"zero_stage": 0}, {}),
    "float32, stage 2": ({}, {"zero_stage": 2}, {}),
    "bfloat16, stage 1": ({"dtype": "bfloat16"}, {"zero_stage": 1}, {}),
    "bfloat16, stage 2, average": ({"dtype": "bfloat16"}, {"zero_stage": 2}, {"teacher": EMA}),
    "float32, stage 3": ({}, {"zero_stage": 3}, {}),
    "float32, LoRA": ({"lora": LoraSpec(r=8, lora_alpha=8)}, {"zero_stage": 1}, {"teacher": EMA}),
    "float32, LoRA over nf4": (
        {"lora": LoraSpec(r=8, lora_alpha=8, quantize_base="nf4")},
        {"zero_stage": 1},
        {"teacher": EMA},
    ),
    "bfloat16, LoRA over nf4": (
        {"dtype": "bfloat16", "lora": LoraSpec(r=8, lora_alpha=8, quantize_base="nf4")},
        {"zero_stage": 2},
        {},
    ),
    "float32, checkpointing": ({"activation_checkpointing": True}, {"zero_stage": 0}, {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_takes_what_the_plan_says(name, write_model, process_group, tmp_path):
    changes, train, others = STEPS[name]
    folder = write_model()
    spec = step_run(
        folder,
        model=evolve(model(folder), **changes),
        training=training(micro_batch_tokens=400, reduce_bucket_size=BUCKET, **train),
        **others,
    )
    measured, saved, tokens = measure_step(spec, tmp_path)
    spec = evolve(spec, training=evolve(spec.training, micro_batch_tokens=tokens))
    plan = make_plan(spec, ON_CPU, shape_at(str(folder), folder))
    assert plan.peak_gib * 2**30 == pytest.approx(measured, rel=MARGIN), plan.memory
    assert plan.disk.checkpoint * 2**30 == pytest.approx(saved, rel=MARGIN)
